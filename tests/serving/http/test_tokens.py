"""Routes and fields about tokens, as vLLM has them, and the small routes that clients and platforms ask for."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serving.http.fake_engine import VOCABULARY, FakeEngine
from tests.serving.http.harness import LEGAL_KEY, Running, running
from tests.serving.http.test_fields import CHAT, COMPLETE, HELLO, TURNS, ask
from tests.serving.http.test_generation import complete, converse, events
from tests.serving.http.test_tools import WEATHER, template

from roadie import embedded
from roadie.serving.belongings import OwnChat
from roadie.version import __version__

TOKENIZER = embedded.load_tokenizer()
TEXT = "The turtle é"


def post(server: Running, path: str, key: str | None = None, **body: Any) -> Any:
    return server.http(key).post(path, json=body)


def test_a_text_is_its_tokens_and_back(open_server: Running) -> None:
    for special in (True, False):
        wanted = TOKENIZER(TEXT, add_special_tokens=special)["input_ids"]
        found = post(open_server, "/tokenize", prompt=TEXT, add_special_tokens=special, return_token_strs=True).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == (wanted, len(wanted), 512)
        assert len(found["token_strs"]) == len(wanted)
    assert post(open_server, "/tokenize", prompt=TEXT).json()["token_strs"] is None
    ids = TOKENIZER(TEXT)["input_ids"]
    assert post(open_server, "/detokenize", tokens=ids).json() == {"prompt": TOKENIZER.decode(ids)}
    assert TOKENIZER.bos_token in TOKENIZER.decode(ids)


def test_a_conversation_is_what_the_model_would_get() -> None:
    own, tokenizer = OwnChat(template("mistral")), embedded.load_tokenizer()
    tokenizer.chat_template = template("hermes")
    cases: list[dict[str, Any]] = [
        {"messages": HELLO},
        {"messages": HELLO, "tools": [WEATHER]},
        {"messages": TURNS, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": HELLO, "add_special_tokens": True},
    ]
    with running(FakeEngine(chats={"legal": own}), tokenizer=tokenizer) as server:
        for fields in cases:
            for model in ("base", "legal"):
                tokens = post(server, "/tokenize", model=model, **fields).json()["tokens"]
                assert ask(server, CHAT, model=model, **fields).status_code == 200
                assert tokens == list(server.engine.requests[-1].prompt_ids)


def test_what_cannot_be_tokens_is_refused_by_name(open_server: Running, with_keys: Running) -> None:
    cases: list[tuple[str, dict[str, Any], str, int]] = [
        ("/tokenize", {}, "prompt", 400),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", 400),
        ("/tokenize", {"messages": HELLO, "tools": [WEATHER]}, "tools", 400),
        ("/tokenize", {"prompt": "a", "model": "nobody=x"}, "model", 400),
        ("/tokenize", {"prompt": "a", "truncate": 5}, "truncate", 400),
        ("/detokenize", {"tokens": [VOCABULARY]}, "tokens", 400),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", 400),
        ("/detokenize", {}, "tokens", 400),
    ]
    for path, body, param, status in cases:
        refused = post(open_server, path, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert post(with_keys, path, **body).status_code == 401
        assert post(with_keys, path, LEGAL_KEY, model="terse", **body).status_code == 404
        assert post(with_keys, path, LEGAL_KEY, model="legal", **body).status_code == 200


@pytest.mark.parametrize("n", [1, 2])
def test_tokens_are_beside_the_texts_where_they_are_wanted(open_server: Running, n: int) -> None:
    asked: dict[str, Any] = {"max_tokens": 3, "n": n, "return_token_ids": True}
    whole = complete(open_server, prompt=TEXT, **asked)["choices"]
    ids = TOKENIZER(TEXT)["input_ids"]
    assert [(each["token_ids"], each["prompt_token_ids"]) for each in whole] == [([1, 2, 3], ids)] * n
    chat = converse(open_server, **asked)
    prompt_ids = list(open_server.engine.requests[-1].prompt_ids)
    assert (chat["prompt_token_ids"], [each["token_ids"] for each in chat["choices"]]) == (prompt_ids, [[1, 2, 3]] * n)
    parts = events(open_server, COMPLETE, prompt=TEXT, **asked)
    assert [part["choices"][0]["prompt_token_ids"] for part in parts if "prompt_token_ids" in part["choices"][0]] == [
        ids
    ] * n
    streamed = events(open_server, CHAT, messages=HELLO, **asked)
    assert [part["prompt_token_ids"] for part in streamed if "prompt_token_ids" in part] == [prompt_ids]
    for stream in (parts, streamed):
        for index in range(n):
            mine = [part["choices"][0]["token_ids"] for part in stream if part["choices"][0]["index"] == index]
            assert [token for some in mine for token in some] == [1, 2, 3]
    assert "token_ids" not in complete(open_server, prompt=TEXT, max_tokens=1)["choices"][0]


def test_small_routes_answer_without_a_key(with_keys: Running) -> None:
    http = with_keys.http()
    assert http.get("/ping").json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": __version__}
    for path, methods in (("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/version", "GET")):
        found = http.request("OPTIONS", path)
        assert (found.status_code, found.content, methods in found.headers["allow"]) == (204, b"", True)
    assert http.request("OPTIONS", "/nowhere").status_code == 404


def test_embeddings_are_refused_by_name(open_server: Running, with_keys: Running) -> None:
    for stream in (False, True):
        refused = post(open_server, "/v1/embeddings", model="base", input="a", stream=stream)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "unsupported_endpoint")
        assert "embeddings" in error["message"]
    assert post(with_keys, "/v1/embeddings", model="base", input="a").status_code == 401
