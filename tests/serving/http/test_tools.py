"""Tools: shown to the model by its chat template, their calls read from what it says, and forced where they must come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import Running, running
from tests.serving.http.test_fields import CHAT, HELLO, ask
from tests.serving.http.test_generation import converse, events
from tests.versions import NO_ENGINE, needs_grammars
from tokenizers import AddedToken

from roadie import embedded
from roadie.errors import ConfigError
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry
from roadie.serving.belongings import OwnChat
from roadie.serving.http.bodies import ChatBody, Message
from roadie.serving.http.offers import offer_of
from roadie.serving.http.response_bodies import ResponsesBody
from roadie.serving.http.settings import HttpSettings
from roadie.serving.http.tools import STYLES, CallReader, Offer, style_of
from roadie.serving.http.turns import turns_of

PARAMETERS = {
    "$defs": {"unit": {"enum": ["C", "F"]}},
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How it is.", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMES = {"weather": PARAMETERS, "clock": None}
MARKS = {"hermes": "<tool_call>", "llama3": "ipython", "mistral": "[TOOL_CALLS]"}
TEMPLATE = (
    "{# MARK #}{% for tool in tools or [] %}({{ tool.function.name }}: {{ tool.function.description }}){% endfor %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE, TWO = {"city": 'a "}{ \\ é', "unit": "C"}, {}


def template(style: str) -> str:
    return TEMPLATE.replace("MARK", MARKS[style])


def read(style: str, *pieces: str, **offer: Any) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls in an answer that comes in these pieces."""
    reader, text, calls = CallReader(Offer(STYLES[style], NAMES, **offer)), "", []
    for said in [*(said for piece in pieces for said in reader.push(piece)), *reader.end()]:
        if said.call is None:
            text += said.text
        elif said.name is not None:
            assert said.call == len(calls)
            calls.append((said.name, said.text))
        else:
            calls[said.call] = (calls[said.call][0], calls[said.call][1] + said.text)
    return text, calls


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


ANSWERS = [
    ("hermes", f"<tool_call>\n{call('weather', ONE)}\n</tool_call>", "", [ONE]),
    ("hermes", f"So <tool_call>{call('weather', ONE)}</tool_call><tool_call>{call('clock', TWO)}</tool_call>", "So", [ONE, TWO]),
    ("hermes", f'<tool_call>\n{{"arguments": {json.dumps(ONE)}, "name": "weather"}}\n</tool_call><end>', "<end>", [ONE]),
    ("hermes", f"<tool_call>[{call('clock', TWO)}, {call('clock', TWO)}]</tool_call>", "", [TWO, TWO]),
    ("hermes", '<tool_call>\n{"name": "clock", "arguments": "{}"}\n</tool_call>', "", [TWO]),
    ("llama3", call("weather", ONE, "parameters"), "", [ONE]),
    ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "", [TWO]),
    ("llama3", f"<|python_tag|>{call('clock', TWO, 'parameters')}; {call('weather', ONE, 'parameters')}", "", [TWO, ONE]),
    ("llama3", f'\n{{"type": "function", "name": "weather", "parameters": {json.dumps(ONE)}}}', "", [ONE]),
    ("mistral", f"[TOOL_CALLS][{call('weather', ONE)}, {call('clock', TWO)}]", "", [ONE, TWO]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {json.dumps(ONE)}, "id": "123456789"}}]', "", [ONE]),
]  # fmt: skip
NO_CALLS = [
    ("hermes", 'A turtle <tool {"name": "clock"}  '),
    ("hermes", f"<tool_call>\n{call('stranger', ONE)}\n</tool_call>"),
    ("hermes", "<tool_call>\nnothing"),
    ("hermes", '<tool_call>\n{"name": "clo'),
    ("hermes", '<tool_call>\n{"name": ["clock"], "arguments": {}}'),
    ("llama3", '{"city": "x"} and more'),
    ("llama3", '{"name": "clock", "legs": 4}'),
    ("llama3", f"It is {call('clock', TWO, 'parameters')}"),
    ("llama3", '{"name": "clock", "parameters"'),
    ("mistral", "[1, 2] [TOOL"),
]


@pytest.mark.parametrize(("style", "answer", "text", "arguments"), ANSWERS)
def test_calls_are_read_however_the_text_is_cut(style: str, answer: str, text: str, arguments: list[Any]) -> None:
    whole = read(style, answer)
    assert (whole[0], [json.loads(each) for _, each in whole[1]]) == (text, arguments)
    assert [name for name, _ in whole[1]] == ["weather" if each else "clock" for each in arguments]
    for cut in range(len(answer)):
        assert read(style, answer[:cut], answer[cut:]) == whole
    assert read(style, *answer) == whole
    assert len(read(style, answer, most=1)[1]) == 1


@pytest.mark.parametrize(("style", "answer"), NO_CALLS)
def test_what_is_no_call_of_a_tool_that_was_offered_is_text_to_the_letter(style: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        text, calls = read(style, *pieces)
        assert (text.strip(), calls) == (answer.strip(), [])


def test_arguments_come_as_they_are_said_and_a_call_that_is_cut_off_has_what_there_is() -> None:
    reader = CallReader(Offer(STYLES["hermes"], NAMES))
    assert reader.push('<tool_call>\n{"name": "weather", "argu') == []
    (begun,) = reader.push('ments": ')[:1] or reader.push("{")[:1]
    assert (begun.name, begun.call) == ("weather", 0)
    assert "".join(said.text for said in reader.push('"city": "Par')).endswith('"city": "Par')
    assert reader.end() == []


def test_the_style_is_that_of_the_template() -> None:
    assert {style: style_of(template(style)) for style in MARKS} == {style: style for style in MARKS}
    assert style_of("{{ messages }}<tool_call>") is None
    assert style_of("{{ tools }}") is None
    assert style_of("{{ tools }}<tool_call><function=x>") is None
    with pytest.raises(ConfigError, match="hermes, llama3, mistral"):
        HttpSettings(tool_format="xml")


@pytest.mark.skipif(
    find_spec("trl") is None, reason="TRL, which has the templates of well-known models, is not installed"
)
@pytest.mark.parametrize(("name", "style"), [("qwen3", "hermes"), ("llama3_1", "llama3"), ("llama3", None)])
def test_templates_of_well_known_models_are_told_apart_and_show_tools_and_calls(name: str, style: str | None) -> None:
    origin = find_spec("trl").origin
    file = Path(origin).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip("this TRL has no such template")
    assert style_of(file.read_text()) == style
    if style is None:
        return
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = file.read_text()
    with running(tokenizer=tokenizer, engine=FakeEngine(max_context_tokens=10_000)) as server:
        said = {"role": "assistant", "tool_calls": [called("c1", arguments=json.dumps(ONE)), called("c2", "clock", "")]}
        messages = [
            {"role": "developer", "content": "Be brief."},
            *HELLO,
            said,
            heard("c1", "21 degrees"),
            heard("c2", "noon"),
        ]
        answer = ask(server, CHAT, messages=messages, tools=[WEATHER, CLOCK])
        assert answer.status_code == 200, answer.text
        prompt = tokenizer.decode(server.engine.requests[-1].prompt_ids)
    parts = ("Be brief.", '"weather"', "How it is.", '"clock"', '"unit": "C"', "21 degrees", "noon")
    assert [part for part in parts if part not in prompt] == []
    assert "developer" not in prompt


def called(id: str, name: str = "weather", arguments: str = '{"city": "Rome"}') -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def heard(id: str, content: str = "21") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def turns(template: str, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    return turns_of([Message.model_validate(message) for message in messages], template)


def test_a_developers_words_are_the_systems_where_the_template_has_no_such_role() -> None:
    asked = {"role": "developer", "content": "Be brief."}
    assert [turn["role"] for turn in turns("{{ messages }}", asked, *HELLO)] == ["system", "user"]
    assert [turn["role"] for turn in turns("{{ role in ['developer'] }}", asked, *HELLO)] == ["developer", "user"]


def test_arguments_of_a_call_are_an_object_where_they_can_be() -> None:
    texts = {'{"a": 1}': {"a": 1}, "": {}, " ": {}, '{"a": ': '{"a": '}
    for text, wanted in texts.items():
        (turn,) = turns("", {"role": "assistant", "tool_calls": [called("c", arguments=text)]})
        assert turn["tool_calls"][0]["function"]["arguments"] == wanted


def test_mistrals_templates_get_ids_of_nine_letters_and_digits_that_agree() -> None:
    ids = ["call_0123456789abcdef01234567", "c1", "abcdEF789"]
    messages = [{"role": "assistant", "tool_calls": [called(id) for id in ids]}, *map(heard, ids)]
    said, *answers = turns(template("mistral"), *messages)
    found = [each["id"] for each in said["tool_calls"]]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", id) for id in found)
    assert (len(set(found)), found[2]) == (3, ids[2])
    assert [(answer["tool_call_id"], answer["name"]) for answer in answers] == [(id, "weather") for id in found]
    said, *_ = turns(template("hermes"), *messages)
    assert [each["id"] for each in said["tool_calls"]] == ids


ONE_CALL = "{% if not message.tool_calls|length == 1 %}{{ raise_exception('One call alone!') }}{% endif %}"


def test_several_calls_are_as_many_turns_where_the_template_takes_one() -> None:
    both = {"role": "assistant", "content": "So.", "tool_calls": [called("a"), called("b", "clock", "{}")]}
    conversation = (*HELLO, both, heard("b", "12:00"), heard("a"), {"role": "assistant", "content": "Well."})
    found = turns(ONE_CALL, *conversation)
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [[call["id"] for call in turn.get("tool_calls", ())] for turn in found] == [[], ["b"], [], ["a"], [], []]
    assert [turn["content"] for turn in found] == ["Hello", "", "12:00", "So.", "21", "Well."]
    unanswered = turns(ONE_CALL, *HELLO, both, heard("a"))
    assert [turn.get("tool_call_id") or turn["role"] for turn in unanswered] == ["user", "assistant", "a", "assistant"]
    assert [call["id"] for call in turns("", *conversation)[1]["tool_calls"]] == ["a", "b"]


def test_a_template_that_takes_one_call_is_offered_one_and_says_itself_what_it_does_not_take() -> None:
    tokenizer = embedded.load_tokenizer()
    refusing = "{% if messages|length > 1 %}{{ raise_exception('One turn alone!') }}{% endif %}{{ tools }} ipython"
    tokenizer.chat_template = refusing
    with running(tokenizer=tokenizer) as server:
        refused = ask(server, CHAT, messages=[*HELLO, *HELLO])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "One turn alone!" in refused.json()["error"]["message"]
    for text, most in ((ONE_CALL, 1), ("", None)):
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message.tool_calls %}"
            + text
            + "{% endif %}{% endfor %}{{ tools }} ipython"
        )
        with running(tokenizer=tokenizer) as server:
            offer = offer_of(ChatBody(model="base", messages=HELLO, tools=[WEATHER]), None, server.service)
            assert offer is not None
            assert offer.most == most


@pytest.fixture
def knowing() -> Iterator[Running]:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = template("hermes")
    with running(tokenizer=tokenizer) as server:
        yield server


def test_the_prompt_shows_tools_calls_and_what_tools_said(knowing: Running) -> None:
    tokenizer = embedded.load_tokenizer()
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "21"},
    ]

    def prompt(**fields: Any) -> str:
        assert ask(knowing, CHAT, messages=messages, **fields).status_code == 200
        return tokenizer.decode(knowing.engine.requests[-1].prompt_ids, skip_special_tokens=True).strip()

    turns = "<user>Hello<assistant>[weather Rome]<tool weather>21<assistant>"
    assert prompt(tools=[WEATHER, CLOCK]) == f"(weather: How it is.)(clock: ){turns}"
    assert prompt(tools=[WEATHER], tool_choice="none") == turns
    assert prompt() == turns


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(("mode", "is_forced"), [("auto", False), ("required", True)])
def test_some_of_the_tools_may_be_all_that_are_allowed(knowing: Running, mode: str, is_forced: bool) -> None:
    body = ChatBody(model="base", messages=HELLO, tools=[WEATHER, CLOCK], tool_choice=allowed(mode, "clock"))
    body.check()
    offer = offer_of(body, None, knowing.service)
    assert offer is not None
    assert (list(offer.parameters), offer.is_forced, [tool.function.name for tool in body.offered]) == (
        ["clock"],
        is_forced,
        ["clock"],
    )
    flat = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "clock"}]}
    tools = [{"type": "function", **each["function"]} for each in (WEATHER, CLOCK)]
    same = ResponsesBody(model="base", input="Hello", tools=tools, tool_choice=flat)
    assert [tool.function.name for tool in same.as_chat().offered] == ["clock"]
    assert same.as_chat().must_call == is_forced
    assert same.echoed["tool_choice"] == flat


def test_what_cannot_be_is_refused_by_name(knowing: Running, open_server: Running) -> None:
    named = {"type": "function", "function": {"name": "stranger"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER], "tool_choice": named}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": allowed("required", "weather")}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", "stranger")}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "guided_regex": "a+"}, "guided_regex"),
        ({"tools": [WEATHER], "guided_json": "{"}, "guided_json"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"messages": [*HELLO, {"role": "assistant"}]}, "messages.1.content"),
    ]
    for fields, param in cases:
        refused = ask(knowing, CHAT, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    said = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    without: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [*HELLO, said]}, "messages.1.tool_calls"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages.1.role"),
    ]
    for fields, param in without:
        error = ask(open_server, CHAT, **fields).json()["error"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert "chat template knows none" in error["message"]


def test_an_adapters_own_template_may_know_tools_and_unknown_styles_can_be_named() -> None:
    engine = FakeEngine(
        chats={
            "legal": OwnChat(template("mistral")),
            "terse": OwnChat("{{ messages }}"),
            "pirate": OwnChat("{{ tools }}"),
        }
    )
    with running(engine) as server:
        answers = {
            name: ask(server, CHAT, model=name, tools=[WEATHER]).status_code
            for name in ("legal", "terse", "pirate", "base")
        }
        assert answers == {"legal": 200, "terse": 400, "pirate": 400, "base": 400}
        assert "--tool-format" in ask(server, CHAT, model="pirate", tools=[WEATHER]).json()["error"]["message"]
    with running(FakeEngine(chats=engine.chats), HttpSettings(tool_format="llama3")) as server:
        assert ask(server, CHAT, model="pirate", tools=[WEATHER]).status_code == 200


def real(style: str, special: bool = False) -> Any:
    """A server of the embedded model, whose template has tools of a style; special: its marks are special tokens."""
    if NO_ENGINE:
        pytest.skip("the engine needs a newer transformers")
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    tokenizer.chat_template = template(style)
    if special:
        tokenizer.add_tokens(
            [AddedToken(mark, special=True) for mark in STYLES[style].marks if len(mark) > 1], special_tokens=True
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    engine = ContinuousBatchingEngine(
        model,
        tokenizer,
        Registry.open(embedded.adapters_path()),
        EngineSettings(num_slots=4, num_blocks=256, max_batch_tokens=128, max_running=16),
    )
    return running(engine, tokenizer=tokenizer)


@needs_grammars
@pytest.mark.parametrize(
    ("style", "special"),
    [("hermes", False), ("llama3", False), ("mistral", False), ("mistral", True), ("hermes", True)],
)
def test_calls_that_must_come_come_and_are_valid(style: str, special: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    with real(style, special) as server:
        fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "n": 4, "seed": 5, "max_tokens": 400, "model": "turtle"}
        one = converse(server, tool_choice=named, **fields)
        for choice in one["choices"]:
            (called,) = choice["message"]["tool_calls"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
            arguments = json.loads(called["function"]["arguments"])
            assert (set(arguments), arguments["unit"] in ("C", "F")) == ({"city", "unit"}, True)
            assert re.fullmatch("[a-z0-9]{9}" if style == "mistral" else "call_[a-f0-9]{24}", called["id"])
        any_of = converse(server, tool_choice="required", parallel_tool_calls=False, **fields)
        names = [[each["function"]["name"] for each in choice["message"]["tool_calls"]] for choice in any_of["choices"]]
        assert all(len(called) == 1 for called in names)
        parts = events(server, CHAT, messages=HELLO, tool_choice=named, **fields)
        for choice in one["choices"]:
            mine = [
                part["choices"][0]
                for part in parts
                if part["choices"] and part["choices"][0]["index"] == choice["index"]
            ]
            pieces = [each for part in mine for each in part["delta"].get("tool_calls") or ()]
            assert pieces[0]["function"]["name"] == "weather"
            assert (
                "".join(piece["function"]["arguments"] for piece in pieces)
                == choice["message"]["tool_calls"][0]["function"]["arguments"]
            )
            assert [part["finish_reason"] for part in mine if part["finish_reason"]] == ["tool_calls"]
            assert len(pieces) > 2
            assert {piece["index"] for piece in pieces} == {0}
        cut = converse(server, **{**fields, "max_tokens": 24}, tool_choice=named)
        assert {choice["finish_reason"] for choice in cut["choices"]} <= {"length", "tool_calls"}


@needs_grammars
def test_several_calls_may_come_and_they_are_parted() -> None:
    with real("hermes") as server:
        found = converse(server, tools=[CLOCK], tool_choice="required", n=8, seed=1, max_tokens=400)
        numbers = {len(choice["message"]["tool_calls"]) for choice in found["choices"]}
        assert len(numbers) > 1
        ids = [each["id"] for choice in found["choices"] for each in choice["message"]["tool_calls"]]
        assert len(set(ids)) == len(ids)
        plain = converse(server, tools=[CLOCK], max_tokens=8, seed=1)["choices"][0]["message"]
        assert isinstance(plain["content"], str)


@needs_grammars
@pytest.mark.parametrize(
    ("style", "of_calls", "of_json"), [("hermes", "<", "{"), ("mistral", "[", "{"), ("llama3", "n", "l")]
)
def test_an_answer_that_is_to_be_json_is_that_or_calls(style: str, of_calls: str, of_json: str) -> None:
    """Their first letters decide (of llama3's, those of the first property), of which a bias leaves one."""
    schema = {"type": "object", "properties": {"legs": {"enum": [4, 8]}}, "required": ["legs"]}
    asked = {"type": "json_schema", "json_schema": {"name": "turtle", "schema": schema}}
    fields: dict[str, Any] = {"tools": [WEATHER], "response_format": asked, "parallel_tool_calls": False}
    fields |= {"max_tokens": 400, "n": 2, "model": "turtle"}
    tokenizer = embedded.load_tokenizer()
    texts = {
        token_id: tokenizer.decode([token_id]).lstrip('{" ' if style == "llama3" else "") for token_id in range(2048)
    }

    def answers(without: str, **more: Any) -> list[dict[str, Any]]:
        bias = {str(token_id): -100 for token_id, text in texts.items() if text.startswith(without)}
        return converse(server, logit_bias=bias, **fields, **more)["choices"]

    with real(style) as server:
        for choice in answers(without=of_calls):
            assert (choice["message"].get("tool_calls"), choice["finish_reason"]) == (None, "stop")
            assert json.loads(choice["message"]["content"]) in ({"legs": 4}, {"legs": 8})
        for choice in (*answers(without=of_json), *answers(without=of_calls, tool_choice="required")):
            (called,) = choice["message"]["tool_calls"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
            assert set(json.loads(called["function"]["arguments"])) == {"city", "unit"}
