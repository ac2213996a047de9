"""Fields that clients send unasked are taken where they ask for nothing, and refused by name where they ask for something."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import Running, running

from roadie import embedded
from roadie.serving.belongings import OwnChat
from roadie.serving.http.settings import HttpSettings

COMPLETE, CHAT, RESPOND = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
ASKING = {COMPLETE: {"prompt": "a"}, CHAT: {"messages": HELLO}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}

NOTHING: dict[str, list[Any]] = {
    "repetition_penalty": [1, 1.0],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "min_tokens": [0],
    "priority": [0],
    "reasoning_effort": ["none"],
    "include_reasoning": [True, False],
    "stream_options": [{}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}],
    "top_k": [-1, 0],
    "top_p": [1],
    "min_p": [0],
    "n": [1],
    "length_penalty": [1, 1.0],
    "early_stopping": [False],
    "use_beam_search": [False],
    "echo": [False],
    "logit_bias": [{}],
    "stop": [[], ""],
    "stop_token_ids": [[]],
    "ignore_eos": [False],
    "include_stop_str_in_output": [False],
    "bad_words": [[]],
    "documents": [[]],
    "logits_processors": [[]],
    "mm_processor_kwargs": [{}],
    "vllm_xargs": [{}],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "response_format": [{"type": "text"}],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "metadata": [{}, {"run": "7"}],
    "store": [False, True],
    "service_tier": ["auto", "default"],
    "user": ["u"],
    "safety_identifier": ["s"],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["24h"],
    "prompt_cache_options": [{}, {"mode": "explicit"}],
    "adapters": [{}],
    "stream": [False],
}
NULLS = (
    *(
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
        "structured_outputs",
    ),
    *("guided_whitespace_pattern", "structural_tag", "truncate_prompt_tokens", "allowed_token_ids", "prompt_logprobs"),
    *("kv_transfer_params", "cache_salt", "add_special_tokens", "temperature", "seed", "max_tokens", "logprobs"),
    *("moderation", "a_field_of_tomorrow"),
)
OF_COMPLETIONS = {"best_of": [1], "suffix": [""]}
OF_CHATS = {
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "verbosity": ["medium"],
    "logprobs": [False],
    "top_logprobs": [0],
    "chat_template_kwargs": [{}],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
}
BOTH = [(path, name, value) for path in ASKING for name, values in NOTHING.items() for value in values]
ALONE = [
    (path, name, value)
    for path, fields in ((COMPLETE, OF_COMPLETIONS), (CHAT, OF_CHATS))
    for name, values in fields.items()
    for value in values
]


def ask(server: Running, path: str, **fields: Any) -> Any:
    return server.http().post(path, json={"model": "base", "max_tokens": 2, **ASKING[path], **fields})


@pytest.mark.parametrize("path", ASKING)
def test_values_that_ask_for_nothing_change_nothing(open_server: Running, path: str) -> None:
    wanted = ask(open_server, path)
    plain = open_server.engine.requests[-1]
    bad = {}
    for _, name, value in [case for case in BOTH + ALONE if case[0] == path]:
        answer = ask(open_server, path, **{name: value})
        if answer.status_code != 200 or answer.json()["choices"] != wanted.json()["choices"]:
            bad[f"{name}={value!r}"] = answer.text
        last = open_server.engine.requests[-1]
        assert (last.sampling, last.prompt_ids) == (plain.sampling, plain.prompt_ids), (name, value)
    assert not bad


@pytest.mark.parametrize("path", ASKING)
def test_null_is_as_if_it_were_left_out(open_server: Running, path: str) -> None:
    own = (
        OF_COMPLETIONS
        if path == COMPLETE
        else {**OF_CHATS, "max_completion_tokens": None, "prediction": None, "audio": None}
    )
    names = [*NOTHING, *NULLS, *own]
    bad = [name for name in names if ask(open_server, path, **{name: None}).status_code != 200]
    assert not bad
    assert ask(open_server, path, **dict.fromkeys(names)).status_code == 200


SOMETHING: dict[str, Any] = {
    "use_beam_search": True,
    "length_penalty": 0.5,
    "priority": 1,
    "reasoning_effort": "high",
    "guided_grammar": "root ::= a",
    "guided_whitespace_pattern": " ",
    "structural_tag": "x",
    "truncate_prompt_tokens": 5,
    "bad_words": ["a"],
    "allowed_token_ids": [5],
    "return_tokens_as_token_ids": True,
    "spaces_between_special_tokens": False,
    "documents": [{"text": "a"}],
    "logits_processors": ["a"],
    "moderation": {"model": "m"},
}
SOMETHING_OF_CHATS: dict[str, Any] = {
    "tools": [TOOL],
    "functions": [{"name": "clock"}],
    "tool_choice": "required",
    "modalities": ["audio"],
    "audio": {"voice": "x"},
    "verbosity": "low",
    "chat_template": "{{ messages }}",
    "web_search_options": {},
}


@pytest.mark.parametrize("path", ASKING)
def test_what_asks_for_something_that_is_not_there_is_refused_by_name(open_server: Running, path: str) -> None:
    for name, value in (SOMETHING | (SOMETHING_OF_CHATS if path == CHAT else {})).items():
        refused = ask(open_server, path, **{name: value})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name), error
        assert name in error["message"]
    unknown = ask(open_server, path, a_field_of_tomorrow=0).json()["error"]
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "a_field_of_tomorrow")


def test_tools_that_may_not_be_called_are_left_out(open_server: Running) -> None:
    for fields in ({"tools": [TOOL], "tool_choice": "none"}, {"functions": [TOOL], "function_call": "none"}):
        assert ask(open_server, CHAT, **fields).status_code == 200


def test_messages_may_have_whatever_else_they_had_when_they_came(open_server: Running) -> None:
    nulls = dict.fromkeys(
        ("audio", "function_call", "tool_calls", "tool_call_id", "name", "refusal", "parsed", "prefix")
    )
    other = {
        "id": "m1",
        "reasoning_content": "hm",
        "annotations": [{"type": "url_citation"}],
        "cache_control": {"type": "e"},
    }
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}, "annotations": [], "id": "p"}
    messages = [
        {"role": "user", "content": [part], "id": "m0", "experimental_providerMetadata": {}},
        {"role": "assistant", "content": "Hi", **nulls, **other},
        {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": []},
        *HELLO,
    ]
    assert ask(open_server, CHAT, messages=messages).status_code == 200
    prompt = embedded.load_tokenizer().decode(open_server.engine.requests[-1].prompt_ids, skip_special_tokens=True)
    assert prompt == "User: Hello\nAssistant: Hi\nAssistant: No.\nUser: Hello\nAssistant:"
    for name, value in (("tool_calls", [TOOL]), ("audio", {"id": "a"}), ("prefix", True)):
        refused = ask(open_server, CHAT, messages=[*HELLO, {"role": "assistant", "content": "x", name: value}])
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", f"messages.1.{name}")


def test_what_is_done_reaches_the_engine(open_server: Running) -> None:
    fields = {"repetition_penalty": 1.3, "min_tokens": 2, "skip_special_tokens": False}
    for path in ASKING:
        assert ask(open_server, path, **fields).status_code == 200
        sampling = open_server.engine.requests[-1].sampling
        assert {name: getattr(sampling, name) for name in fields} == fields
        error = ask(open_server, path, min_tokens=3).json()["error"]
        assert (error["param"], error["code"]) == ("min_tokens", "invalid_value")
        assert ask(open_server, path, repetition_penalty=0).json()["error"]["param"] == "repetition_penalty"
    with_own = ask(open_server, COMPLETE, add_special_tokens=True).json()["usage"]["prompt_tokens"]
    assert with_own == 1 + ask(open_server, COMPLETE, add_special_tokens=False).json()["usage"]["prompt_tokens"]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}!{% endif %}{% endif %}"
)
TURNS = [*HELLO, {"role": "assistant", "content": "A turtle "}]


def test_a_template_has_its_variables_and_an_answer_goes_on_where_it_ended() -> None:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    cases: list[tuple[list[Any], dict[str, Any], dict[str, Any]]] = [
        (HELLO, {}, {"add_generation_prompt": True}),
        (HELLO, {"add_generation_prompt": False}, {}),
        (
            HELLO,
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"add_generation_prompt": True, "enable_thinking": False},
        ),
        (TURNS, {"continue_final_message": True}, {"continue_final_message": True}),
        (TURNS, {"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
    ]
    with running(tokenizer=tokenizer) as server:
        seen = set()
        for messages, fields, wanted in cases:
            assert ask(server, CHAT, messages=messages, **fields).status_code == 200
            expected = tokenizer.apply_chat_template(messages, return_dict=False, **wanted)
            assert list(server.engine.requests[-1].prompt_ids) == expected
            seen.add(tuple(expected))
            ask(server, CHAT, messages=messages, add_special_tokens=True, **fields)
            assert list(server.engine.requests[-1].prompt_ids) == [tokenizer.bos_token_id, *expected]
        assert len(seen) == 4
        for wrong in (
            {"chat_template": "x"},
            {"tools": [TOOL]},
            {"tokenize": False},
            {"messages": []},
            {"conversation": []},
        ):
            error = ask(server, CHAT, chat_template_kwargs=wrong).json()["error"]
            assert (error["param"], error["code"]) == ("chat_template_kwargs", "invalid_value")
            assert next(iter(wrong)) in error["message"]
        both = ask(server, CHAT, messages=TURNS, continue_final_message=True, add_generation_prompt=True)
        assert both.json()["error"]["param"] == "add_generation_prompt"
        empty = ask(server, CHAT, messages=[*HELLO, {"role": "assistant", "content": ""}], continue_final_message=True)
        assert empty.json()["error"]["param"] == "messages"


def test_plain_text_goes_on_where_it_ended_and_has_no_variables(open_server: Running) -> None:
    tokenizer = embedded.load_tokenizer()
    for fields, wanted in (
        ({"continue_final_message": True}, "User: Hello\nAssistant: A turtle "),
        ({"add_generation_prompt": False}, "User: Hello\nAssistant: A turtle "),
        ({}, "User: Hello\nAssistant: A turtle \nAssistant:"),
    ):
        answer = ask(open_server, CHAT, messages=TURNS, **fields).json()
        assert tokenizer.decode(open_server.engine.requests[-1].prompt_ids, skip_special_tokens=True) == wanted
        assert answer["choices"][0]["message"]["content"].startswith("base" if not fields else " base")
    error = ask(open_server, CHAT, chat_template_kwargs={"enable_thinking": False}).json()["error"]
    assert (error["param"], "has none" in error["message"]) == ("chat_template_kwargs", True)


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content.0.type", "got 'image_url'; wanted 'text'"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a text or a list of parts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        (COMPLETE, {"stop": [""]}, "stop.0", "at least 1 character"),
        (COMPLETE, {"stop": 5}, "stop", "a text or a list of texts"),
        (COMPLETE, {"logit_bias": {"hello": 1}}, "logit_bias.hello", "got a key that cannot be one"),
        (COMPLETE, {"logit_bias": {"5": "x"}}, "logit_bias.5", "valid number"),
        (COMPLETE, {"prompt": [5, "a"]}, "prompt.1", "valid integer"),
        (COMPLETE, {"prompt": ["a", 5]}, "prompt.1", "a text or a list of token ids"),
        (COMPLETE, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_where_a_value_may_be_of_several_kinds_the_error_is_of_the_one_it_is(
    open_server: Running, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    error = ask(open_server, path, **fields).json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert ", or: " not in error["message"]


def test_a_chat_with_an_adapter_uses_the_template_that_it_brings() -> None:
    """Also with more or less of it, and its turn ends as the template's turns do; blends of several use the model's."""
    own = TEMPLATE.replace("<", "[").replace(">", "]")
    tokenizer, chats = embedded.load_tokenizer(), {"legal": OwnChat(own, "<pad>"), "terse": OwnChat(own, "<|im_end|>")}
    for settings, is_used in ((HttpSettings(), True), (HttpSettings(use_adapter_templates=False), False)):
        with running(FakeEngine(chats=chats), settings) as server:

            def prompt_of(model: str, server: Running = server, **fields: Any) -> tuple[str, Any]:
                assert ask(server, CHAT, model=model, **fields).status_code == 200
                request = server.engine.requests[-1]
                return tokenizer.decode(request.prompt_ids, skip_special_tokens=True), request.sampling

            plain = "User: Hello\nAssistant:"
            rendered = tokenizer.apply_chat_template(
                HELLO, chat_template=own, tokenize=False, add_generation_prompt=True
            )
            for model in ("legal", "legal=0.5", "base:legal", "terse"):
                text, rules = prompt_of(model)
                assert text == (rendered if is_used else plain)
                assert rules.stop == (() if is_used else ("\nUser:",))
                ends = (
                    (tokenizer.pad_token_id,) if is_used and "legal" in model else ()
                )  # of terse's token there is none
                assert rules.stop_token_ids == ends
            for model in ("base", "pirate", "legal=0.5+terse=0.5", "legal=0"):
                assert prompt_of(model)[0] == plain
            if is_used:
                assert prompt_of("legal", chat_template_kwargs={"enable_thinking": False})[0] == f"{rendered}!"
                assert prompt_of("legal", stop_token_ids=[7])[1].stop_token_ids == (7, tokenizer.pad_token_id)
                assert prompt_of("legal", ignore_eos=True)[1].stop_token_ids == ()


def test_a_template_that_cannot_be_used_is_an_error_of_the_request_alone() -> None:
    chats = {
        "legal": OwnChat("{% for"),
        "terse": OwnChat("{{ raise_exception('no') }}"),
        "pirate": OwnChat("{{ ''.__class__ }}"),
    }
    with running(FakeEngine(chats=chats)) as server:
        for model in ("legal", "terse"):
            refused = ask(server, CHAT, model=model)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert ask(server, CHAT, model="pirate").status_code == 400  # a sandbox
        assert ask(server, COMPLETE, model="legal").status_code == 200


def test_every_field_of_openais_requests_is_known_by_name(open_server: Running) -> None:
    """Those of the official package: what this server does not have says so, and no field is unknown."""
    for path, params in ((CHAT, CompletionCreateParamsBase), (RESPOND, ResponseCreateParamsBase)):
        asked = {"model": "base", **({"messages": HELLO} if path == CHAT else {"input": "Hello"})}
        wrong = {}
        for name in params.__annotations__.keys() - asked.keys():
            for value in ({"of": "tomorrow"}, ["tomorrow"], "tomorrow"):
                answer = open_server.http().post(path, json={**asked, name: value}).json()
                error = answer.get("error") or {"code": None, "param": None}
                if (error["code"], error["param"]) == ("unknown_parameter", name):
                    wrong[name] = error
        assert not wrong


def test_what_an_assistant_refused_is_what_it_said(open_server: Running) -> None:
    said = [{"role": "assistant", "content": "No."}, *HELLO]
    ask(open_server, CHAT, messages=[*HELLO, *said])
    wanted = open_server.engine.requests[-1].prompt_ids
    part = {"type": "refusal", "refusal": "No."}
    for message in ({"content": [part]}, {"content": None, "refusal": "No."}, {"refusal": "No."}):
        answer = ask(open_server, CHAT, messages=[*HELLO, {"role": "assistant", **message}, *HELLO])
        assert (answer.status_code, open_server.engine.requests[-1].prompt_ids) == (200, wanted), answer.text
    items = [*HELLO, {"type": "message", "role": "assistant", "content": [part]}, *HELLO]
    answer = open_server.http().post(RESPOND, json={"model": "base", "input": items, "max_output_tokens": 2})
    assert (answer.status_code, open_server.engine.requests[-1].prompt_ids) == (200, wanted), answer.text
    broken = ask(open_server, CHAT, messages=[{"role": "assistant", "content": [{"type": "refusal"}]}])
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "messages.0.content.0.text")


OF_RESPONSES: dict[str, list[Any]] = {
    "reasoning": [{}, {"effort": None, "summary": None}, {"effort": "none"}],
    "max_tool_calls": [3],
    "context_management": [[]],
    "text": [{}, {"format": {"type": "text"}, "verbosity": "medium"}],
    "truncation": ["disabled"],
    "stream_options": [{"include_obfuscation": False}],
    "include": [[]],
}


def test_values_that_ask_for_nothing_of_responses_are_taken(open_server: Running) -> None:
    asked = {"model": "base", "input": "Hello", "max_output_tokens": 2}
    sent = [{name: value} for name, values in OF_RESPONSES.items() for value in values]
    answers = [open_server.http().post(RESPOND, json=asked | each) for each in sent]
    assert not [(each, answer.text) for each, answer in zip(sent, answers, strict=True) if answer.status_code != 200]
