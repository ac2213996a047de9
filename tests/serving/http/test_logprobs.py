"""Tokens beside logprobs: their own bytes, alternatives kept apart, the chosen one among them, and where each begins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serving.http import fake_engine
from tests.serving.http.harness import Running, running
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from roadie import embedded
from roadie.serving.engine import TokenLogprob

TEXT = "é 漢字 🙂 ok"
CHOSEN = embedded.load_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
HELLO = [{"role": "user", "content": "Hello"}]


def pieces_of(ids: list[int]) -> list[bytes]:
    """The bytes of tokens by another way: what each adds to the text, where all parts of characters are shown as they are."""
    letters = embedded.load_tokenizer().backend_tokenizer
    table = {letter: byte for byte, letter in _byte_letters().items()}
    return [bytes(table[letter] for letter in letters.id_to_token(token)) for token in ids]


def _byte_letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """An engine whose tokens are those of `TEXT`; beside each, the tokens before and after it, likelier than itself."""

    def logprobs(job: Any) -> tuple[TokenLogprob, ...]:
        num_top = job.request.sampling.logprobs
        if num_top is None:
            return ()
        token = CHOSEN[(job.count - 1) % len(CHOSEN)]
        others = [each for each in dict.fromkeys(CHOSEN) if each != token]
        top = tuple((each, -0.1 * rank) for rank, each in enumerate(others[:num_top], 1))
        return (TokenLogprob(token, -5.0, top),)

    monkeypatch.setattr(fake_engine, "_logprobs", logprobs)
    with running() as found:
        yield found


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    body = {"model": "base", "prompt": "a", "max_tokens": len(CHOSEN), **fields}
    return server.http().post("/v1/completions", json=body).json()["choices"][0]["logprobs"]


def test_a_chat_has_the_bytes_of_each_token(server: Running) -> None:
    body = {"model": "base", "messages": HELLO, "max_tokens": len(CHOSEN), "logprobs": True, "top_logprobs": 3}
    content = server.http().post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    wanted = pieces_of(CHOSEN)
    assert [bytes(entry["bytes"]) for entry in content] == wanted
    assert len(CHOSEN) > len(TEXT)  # some are parts of characters
    for entry, own in zip(content, wanted, strict=True):
        assert entry["token"] == own.decode("utf-8", "backslashreplace")
        assert "\ufffd" not in entry["token"]
        top = [(each["token"], each["logprob"], bytes(each["bytes"])) for each in entry["top_logprobs"]]
        assert len(top) == len({each for _, _, each in top}) == 4
        assert top[-1] == (entry["token"], -5.0, own)
    body["top_logprobs"] = 0
    content = server.http().post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_a_completion_keeps_alternatives_apart_and_has_the_chosen_one(server: Running) -> None:
    for num_top in (0, 1, 3, 20):
        found = complete(server, logprobs=num_top)
        for token, chosen, top, own in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], pieces_of(CHOSEN), strict=True
        ):
            assert len(top) == min(num_top, len(set(CHOSEN)) - 1) + 1
            assert top[token] == chosen == -5.0
            try:
                assert token == own.decode()
            except UnicodeDecodeError:
                assert token == "bytes:" + own.decode("utf-8", "backslashreplace")
                assert re.fullmatch(r"bytes:.?(\\x[0-9a-f]{2})+", token)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_in_the_text(server: Running, stream: bool) -> None:
    """Of each token: where the character begins that it is a part of."""
    if stream:
        body = {"model": "base", "prompt": "a", "max_tokens": len(CHOSEN), "logprobs": 1}
        client = server.openai()
        parts = client.completions.create(stream=True, **body)
        offsets = [offset for part in parts for offset in part.choices[0].logprobs.text_offset]
    else:
        offsets = complete(server, logprobs=1)["text_offset"]
    wanted, before = [], b""
    for own in pieces_of(CHOSEN):
        wanted.append(len(before.decode("utf-8", "ignore")))
        before += own
    assert offsets == wanted
    assert offsets == sorted(offsets)
    assert offsets[-1] < len(TEXT)


def test_special_tokens_take_no_place_where_they_are_not_shown(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = embedded.load_tokenizer().eos_token_id
    monkeypatch.setattr("tests.serving.http.test_logprobs.CHOSEN", [CHOSEN[-1], eos, CHOSEN[-1]])
    size = len(pieces_of(CHOSEN[-1:])[0].decode())
    assert complete(server, logprobs=0)["text_offset"] == [0, size, size]
    assert complete(server, logprobs=0, skip_special_tokens=False)["text_offset"] == [0, size, size + len("</s>")]


def test_a_character_that_is_never_complete_has_a_place(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    half = next(
        token for token, own in zip(CHOSEN, pieces_of(CHOSEN), strict=True) if own[-1] >= 0xC0 and len(own) == 1
    )
    monkeypatch.setattr("tests.serving.http.test_logprobs.CHOSEN", [half, half, CHOSEN[-1], half])
    text = b"".join(pieces_of(CHOSEN)).decode("utf-8", "replace")
    assert complete(server, logprobs=0)["text_offset"] == [0, 1, 2, len(text) - 1]


def test_a_vocabulary_with_bytes_beside_words_has_its_bytes_too() -> None:
    """As sentencepiece does it: words begin with a mark, and bytes that no word has are tokens such as <0xE2>."""
    from roadie.serving.http.pieces import Pieces

    words = ["<unk>", "\u2581turtle", "s", *(f"<0x{byte:02X}>" for byte in range(256)), "turtle", "\u2581"]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    replace = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<0x41>s", special=True)])
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [pieces.bytes_of(token) for token in (1, 2, 259, 260)] == [b" turtle", b"s", b"turtle", b" "]
    assert [pieces.bytes_of(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert pieces.bytes_of(261) == b"<0x41>s"
    assert pieces.bytes_of(5000) == b""
    # Two tokens with one text: the chosen one has it, the other is told by its id.
    letter = 3 + ord("s")
    assert pieces.keyed(TokenLogprob(2, -1.0, ((letter, -0.5), (2, -1.0)))) == {f"token_id:{letter}": -0.5, "s": -1.0}


def test_words_that_begin_without_a_mark_have_their_space() -> None:
    """As WordPiece does it: what goes on in a word has a mark, which is not shown, and what begins one has a space before it."""
    from roadie.serving.http.pieces import Offsets, Pieces

    words = ["[UNK]", "turtle", "swim", "##s", ","]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    pieces = Pieces(fast)
    prompt, answer = [1], [2, 3, 4, 1, 3]
    text = fast.decode(prompt + answer).removeprefix(fast.decode(prompt))
    assert text == " swims, turtles"
    assert b"".join(map(pieces.bytes_of, answer)).decode() == text
    offsets = Offsets(pieces, 0, skipped=pieces.special)
    assert [offsets.next(token) for token in answer] == [0, 5, 6, 7, 14]
