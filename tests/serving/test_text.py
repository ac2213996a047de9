"""Text as it comes: together it is what the tokens say, and nothing of a stop string is ever shown too early."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadie import embedded
from roadie.serving.text import TextStream

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40)
LETTERS = st.text("ab ", max_size=30)


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, so that most characters take several."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class StripsFirstSpace(Bytes):
    """As sentencepiece does: a text never begins with the space of its first word."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return super().decode(ids).removeprefix(" ")


def streamed(
    tokenizer: Any, prompt: list[int], ids: list[int], stop: tuple[str, ...] = (), **settings: Any
) -> list[str]:
    """The pieces, up to the one with which the text ended."""
    stream, pieces = TextStream(tokenizer, prompt, stop, **settings), []
    for token in ids:
        piece, is_over = stream.push(token)
        pieces.append(piece)
        if is_over:
            return pieces
    return [*pieces, stream.end()]


@given(TEXTS, TEXTS)
def test_pieces_join_to_the_text_and_no_piece_has_half_a_character(prompt: str, text: str) -> None:
    pieces = streamed(Bytes(), list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == text
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


@given(TEXTS)
def test_the_space_before_the_first_word_is_kept(text: str) -> None:
    assert "".join(streamed(StripsFirstSpace(), list(b"once"), list(f" upon{text}".encode()))) == f" upon{text}"


def test_bytes_that_are_no_text_are_shown_in_the_end() -> None:
    assert "".join(streamed(Bytes(), [], [0x61, 0xF0, 0x9F])) == "a\ufffd"
    assert len("".join(streamed(Bytes(), [], [0xFF] * 30))) == 30


@given(LETTERS, st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_a_text_ends_at_the_first_stop_string_and_shows_nothing_of_it(
    text: str, stops: list[str], include: bool
) -> None:
    pieces = streamed(Bytes(), [], list(text.encode()), tuple(stops), include_stop=include)
    places = [
        (end - len(stop), len(stop)) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    if not places:
        assert "".join(pieces) == text
        return
    first_end = min(begin + length for begin, length in places)
    begin, length = min(place for place in places if sum(place) == first_end)
    assert "".join(pieces) == text[: begin + length if include else begin]


@given(LETTERS)
def test_what_is_shown_is_never_taken_back(text: str) -> None:
    """After every token: all that is shown is before any end that a stop string could begin with."""
    stream, shown = TextStream(Bytes(), [], ("ab a",)), ""
    for number, token in enumerate(text.encode(), start=1):
        piece, is_over = stream.push(token)
        shown += piece
        if is_over:
            break
        assert text.startswith(shown)
        held = text[len(shown) : number]
        assert "ab a".startswith(held)


@pytest.mark.parametrize("text", ["def f(x):\n    return x", "Grüße, 東京 🙂!", "  two  spaces "])
def test_the_embedded_tokenizer(text: str) -> None:
    tokenizer = embedded.load_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt = tokenizer("Once").input_ids
    assert "".join(streamed(tokenizer, prompt, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_shown_where_they_are_wanted() -> None:
    tokenizer = embedded.load_tokenizer()
    ids = [*tokenizer("A turtle", add_special_tokens=False)["input_ids"], tokenizer.bos_token_id]
    assert "".join(streamed(tokenizer, [5], ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, [5], ids, skip_special=False)).endswith("turtle<s>")


def test_stop_strings_count_after_the_fewest_tokens() -> None:
    """Those that end within the first tokens are text; one that begins later ends it."""
    ids = list(b"abxabxab")
    assert "".join(streamed(Bytes(), [], ids, ("ab",), min_tokens=5)) == "abxabx"
    assert "".join(streamed(Bytes(), [], ids, ("ab",), min_tokens=99)) == "abxabxab"
    assert "".join(streamed(Bytes(), [], ids, ("ab",))) == ""
