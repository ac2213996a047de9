"""What an answer is to be: OpenAI's `response_format`, and the names that vLLM has for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tests.patience import until
from tests.serving.http.harness import Running, running
from tests.serving.http.test_fields import ASKING, CHAT, COMPLETE, ask
from tests.serving.http.test_generation import converse, events
from tests.versions import NO_ENGINE, needs_grammars

from roadie import embedded
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry
from roadie.serving.grammars import Constraint, Kind, one_of
from roadie.serving.http import service

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
BY_SCHEMA = Constraint(Kind.JSON, json.dumps(SCHEMA, separators=(",", ":")))
BY_TEXT, OBJECT, REGEX = (
    Constraint(Kind.JSON, "{}"),
    Constraint(Kind.JSON, '{"type":"object"}'),
    Constraint(Kind.REGEX, "a+"),
)
NAMED = {"name": "x", "schema": SCHEMA, "strict": True, "description": "d"}
pytestmark = needs_grammars


@pytest.mark.parametrize("path", ASKING)
def test_every_way_to_say_it_is_the_same_constraint(open_server: Running, path: str) -> None:
    cases: list[tuple[dict[str, Any], Constraint | None]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OBJECT),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, BY_SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, OBJECT),
        ({"guided_json": SCHEMA}, BY_SCHEMA),
        ({"guided_json": "{}"}, BY_TEXT),
        ({"guided_regex": "a+"}, REGEX),
        ({"guided_choice": ["a", "b"]}, one_of(["a", "b"])),
        ({"structured_outputs": {"json": SCHEMA}}, BY_SCHEMA),
        ({"structured_outputs": {"regex": "a+", "disable_fallback": True, "disable_any_whitespace": False}}, REGEX),
        ({"structured_outputs": {"choice": ["a", "b"]}}, one_of(["a", "b"])),
        ({"structured_outputs": {"json_object": True}}, OBJECT),
        ({"structured_outputs": {"json_object": False}}, None),
    ]
    for fields, wanted in cases:
        assert ask(open_server, path, **fields).status_code == 200, fields
        assert open_server.engine.requests[-1].constraint == wanted


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"guided_regex": "wrong"}, "guided_regex", "invalid_value"),
        ({"structured_outputs": {"regex": "wrong"}}, "structured_outputs.regex", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "invalid_value"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        ({"response_format": {"type": "text", "json_schema": NAMED}}, "response_format.json_schema", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_parameter"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "unsupported_parameter"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"guided_regex": ""}, "guided_regex", "invalid_value"),
        ({"guided_json": [1]}, "guided_json", "invalid_value"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema.name", "missing_parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(open_server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    for path in ASKING:
        for stream in (False, True):
            refused = ask(open_server, path, stream=stream, **fields)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"], error["code"]) == (400, param, code), error


def test_a_server_without_the_library_says_so(open_server: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(service, "is_installed", lambda: False)
    error = ask(open_server, CHAT, response_format={"type": "json_object"}).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "unsupported_parameter")
    assert "roadie[serve]" in error["message"]
    assert ask(open_server, CHAT, response_format={"type": "text"}).status_code == 200


def test_others_are_answered_while_a_constraint_is_compiled() -> None:
    with running() as server, ThreadPoolExecutor(1) as beside:
        server.engine.held.set()
        slow = beside.submit(ask, server, COMPLETE, guided_regex="slow")
        until(lambda: server.service.compiling._threads and server.service.compiling._work_queue.empty())
        assert server.http().get("/health").status_code == 200
        assert not slow.done()
        server.engine.held.clear()
        assert slow.result().status_code == 200


class Turtle(BaseModel):
    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)
    friends: list[str] = Field(max_length=2)


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    if NO_ENGINE:
        pytest.skip("the engine needs a newer transformers")
    settings = EngineSettings(num_slots=4, num_blocks=256, max_batch_tokens=128, max_running=16)
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    engine = ContinuousBatchingEngine(model, tokenizer, Registry.open(embedded.adapters_path()), settings)
    with running(engine, tokenizer=tokenizer) as server:
        yield server


def test_choices_streams_and_logprobs_of_an_answer_by_a_schema(real: Running) -> None:
    schema = Turtle.model_json_schema()
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "Turtle", "schema": schema}},
        "seed": 3,
    }
    whole = converse(real, model="turtle", n=3, logprobs=True, **fields)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    for choice, text in zip(whole["choices"], texts, strict=True):
        Turtle.model_validate_json(text)
        assert choice["finish_reason"] == "stop"
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]).strip() == text
        assert all(entry["logprob"] > -1e30 for entry in choice["logprobs"]["content"])
    counted = sum(len(choice["logprobs"]["content"]) for choice in whole["choices"])
    assert whole["usage"]["completion_tokens"] == counted
    parts = events(real, CHAT, model="turtle", messages=[{"role": "user", "content": "Hello"}], n=3, **fields)
    streamed = ["", "", ""]
    for part in parts:
        for choice in part["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def test_the_official_client_parses_what_comes_and_says_where_it_was_cut(real: Running) -> None:
    client, turns = real.openai(), [{"role": "user", "content": "A turtle?"}]
    done = client.chat.completions.parse(model="turtle", messages=turns, response_format=Turtle)
    assert isinstance(done.choices[0].message.parsed, Turtle)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="turtle", messages=turns, response_format=Turtle, max_tokens=3)


def test_a_schema_that_no_answer_can_be_kept_to_is_a_bad_request(real: Running) -> None:
    for stream in (False, True):
        refused = ask(real, COMPLETE, stream=stream, guided_json={"type": "array", "uniqueItems": True})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "guided_json")
        assert re.search("cannot be used.*uniqueItems", error["message"])
