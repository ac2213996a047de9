"""Tokens as callers see them beside logprobs: their bytes, a text for each, and where each begins in the answer.

A token of a byte-level vocabulary may hold parts of characters. Its bytes are its own, and not those of U+FFFD; what is no UTF-8
is shown as OpenAI shows it:

    " turtle"           the text
    " \\xe2\\x80"         chats: bytes that are no text, after a space
    "bytes: \\xe2\\x80"   completions
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator
from typing import Any

from roadie.serving.engine import TokenLogprob

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_letter() -> dict[str, int]:
    """The letters that byte-level vocabularies (of GPT-2 and after) write bytes with: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _byte_of_letter()


class Pieces:
    """The tokens of a tokenizer, of transformers' own kind."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(added) for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = backend.decoder.__getstate__() if backend is not None and backend.decoder is not None else b""
        self._is_byte_level = b'"ByteLevel"' in decoder or hasattr(tokenizer, "byte_decoder")
        self._has_bytes = b'"ByteFallback"' in decoder or backend is None

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; nothing where the vocabulary has no such token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if self._is_byte_level and all(letter in _LETTERS for letter in piece):
            return bytes(_LETTERS[letter] for letter in piece)
        byte = _BYTE.fullmatch(piece) if self._has_bytes else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return self._text_after_another(token_id).encode()

    def _text_after_another(self, token_id: int) -> str:
        """What a token adds to a text, as in " sea" or, of WordPiece's "##ing", "ing": what it adds to itself."""
        once, twice = (self._decoded([token_id] * times) for times in (1, 2))
        return twice[len(once) :] if twice.startswith(once) else once

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def text_of(self, token_id: int) -> str:
        """A text for a token, as chats have it."""
        return self.bytes_of(token_id).decode("utf-8", "backslashreplace")

    def key_of(self, token_id: int) -> str:
        """A text for a token, as completions have it."""
        content = self.bytes_of(token_id)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return f"bytes:{content.decode('utf-8', 'backslashreplace')}"

    def keyed(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives at a token by their texts, itself among them; of two with one text, one is `token_id:` and its id."""
        taken = {self.key_of(entry.token_id): entry.token_id}
        keyed: dict[str, float] = {}
        for token_id, logprob in alternatives(entry):
            key = self.key_of(token_id)
            is_free = taken.setdefault(key, token_id) == token_id
            keyed[key if is_free else f"token_id:{token_id}"] = logprob
        return keyed


def alternatives(entry: TokenLogprob) -> Iterator[tuple[int, float]]:
    """The likeliest tokens there, and the one that was chosen, whether it is one of them or not."""
    yield from entry.top
    if all(token_id != entry.token_id for token_id, _ in entry.top):
        yield entry.token_id, entry.logprob


class Offsets:
    """Where tokens begin, in characters of a text: one after another, of one text. start: where the first one does; before the
    text: -1, where it begins with a space that the text does not have. skipped: tokens that are not part of the text.

    A character belongs to the token that completes it; the tokens before begin where it begins.
    """

    def __init__(self, pieces: Pieces, start: int, *, skipped: Collection[int] = ()) -> None:
        self._pieces, self._at, self._skipped = pieces, start, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token_id: int) -> int:
        """Where this token begins."""
        if token_id in self._skipped:
            return max(0, self._at)
        content = self._pieces.bytes_of(token_id)
        if content and content[0] & 0xC0 != 0x80:  # a character begins: one that is not complete is shown as U+FFFD
            self._at += len(self._decoder.decode(b"", True))
        begin = self._at
        self._at += len(self._decoder.decode(content))
        return max(0, begin)
