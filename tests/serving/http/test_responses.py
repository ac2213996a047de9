"""OpenAI's Responses API without a memory: the official client gets texts, formats, calls and events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tests.serving.http.harness import USER_KEY, Running, running
from tests.serving.http.test_fields import CHAT, HELLO, ask
from tests.serving.http.test_generation import converse
from tests.serving.http.test_tools import PARAMETERS, real, template
from tests.versions import needs_grammars

from roadie import embedded
from roadie.serving.http import answers

TOOL = {"type": "function", "name": "weather", "description": "How it is.", "parameters": PARAMETERS}


def respond(server: Running, **body: Any) -> dict[str, Any]:
    found = server.http().post("/v1/responses", json={"model": "base", "input": "Hello", **body})
    assert found.status_code == 200, found.text
    answers.ResponseAnswer.model_validate(found.json(), strict=True)
    return found.json()


def test_an_answer_is_that_of_the_chat_and_nothing_is_stored(open_server: Running) -> None:
    found = respond(open_server, max_output_tokens=4, instructions="Be brief.", store=True, metadata={"run": "7"})
    request = open_server.engine.requests[-1]
    chat = converse(open_server, messages=[{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=4)
    assert (request.prompt_ids, request.sampling) == tuple(
        getattr(open_server.engine.requests[-1], name) for name in ("prompt_ids", "sampling")
    )
    (item,) = found["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (found["store"], found["previous_response_id"], found["metadata"]) == (False, None, {"run": "7"})
    usage = chat["usage"]
    assert [found["usage"][f"{name}_tokens"] for name in ("input", "output", "total")] == [
        usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")
    ]
    adapted = respond(open_server, max_output_tokens=1, model="base", adapters={"legal": 0.5})
    assert "legal*0.5" in adapted["output"][0]["content"][0]["text"]


def test_items_are_the_messages_of_a_chat() -> None:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = template("hermes")
    called = [
        {"type": "function_call", "call_id": f"c{n}", "name": "weather", "arguments": '{"city": "Rome"}'}
        for n in (1, 2)
    ]
    heard = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "21"}]}
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
        "id": "m",
    }
    asked = {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}
    items = [*HELLO, said, asked, {"type": "reasoning", "id": "r", "summary": []}, *called, heard]
    with running(tokenizer=tokenizer) as server:
        respond(server, input=items, tools=[TOOL], max_output_tokens=1)
        prompt = tokenizer.decode(server.engine.requests[-1].prompt_ids, skip_special_tokens=True)
    turns = "<user>Hello<assistant>Hi<user>And?<assistant>[weather Rome][weather Rome]<tool weather>21<assistant>"
    assert prompt.strip() == f"(weather: How it is.){turns}"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "unsupported_parameter"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tools": [TOOL]}, "tools", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing_parameter"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id", "missing_parameter"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow", "unknown_parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(open_server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    for stream in (False, True):
        sent = {"model": "base", "input": "Hello", "stream": stream, **fields}
        refused = open_server.http().post("/v1/responses", json=sent)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, param, code), error


def test_the_official_client_streams_what_it_gets_whole(with_keys: Running) -> None:
    client = with_keys.openai(USER_KEY)
    whole = client.responses.create(model="legal", input="Hello", max_output_tokens=5)
    *events, last = client.responses.create(model="legal", input="Hello", max_output_tokens=5, stream=True)
    assert whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert (last.type, last.response.output_text) == ("response.incomplete", whole.output_text)
    assert [event.sequence_number for event in (*events, last)] == list(range(len(events) + 1))
    assert [event.type.removeprefix("response.") for event in events if "delta" not in event.type] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done"),
    ]
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="Hello", stream=True)


class Turtle(BaseModel):
    name: str = Field(max_length=8)
    legs: int = Field(ge=0, le=8)


@pytest.fixture(scope="module")
def knowing() -> Iterator[Running]:
    with real("hermes") as server:
        yield server


@needs_grammars
def test_formats_and_calls_come_as_the_client_knows_them(knowing: Running) -> None:
    client = knowing.openai()
    parsed = client.responses.parse(model="turtle", input="A turtle?", text_format=Turtle)
    assert isinstance(parsed.output_parsed, Turtle)
    assert parsed.status == "completed"
    asked: dict[str, Any] = {
        "model": "turtle", "input": "Hello", "tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}
    }  # fmt: skip
    (call,) = client.responses.create(**asked).output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    events = list(client.responses.create(**asked, stream=True))
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (streamed,) = events[-1].response.output
    assert (streamed.arguments, set(json.loads(arguments))) == (arguments, {"city", "unit"})
    assert ask(knowing, CHAT, tools=[], max_tokens=1).status_code == 200
