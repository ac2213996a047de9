"""Completions and chats, with the official client and without, against an engine that counts."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter
from tests.patience import until
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import KEYS, USER_KEY, Running, running

from roadie import embedded
from roadie.serving.http import answers
from roadie.serving.http.settings import HttpSettings

HELLO = [{"role": "user", "content": "Hello"}]


def complete(server: Running, **body: Any) -> dict[str, Any]:
    response = server.http().post("/v1/completions", json={"model": "base", "prompt": "a b", **body})
    assert response.status_code == 200, response.text
    answers.Completion.model_validate(response.json(), strict=True)
    return response.json()


def converse(server: Running, **body: Any) -> dict[str, Any]:
    response = server.http().post("/v1/chat/completions", json={"model": "base", "messages": HELLO, **body})
    assert response.status_code == 200, response.text
    answers.Chat.model_validate(response.json(), strict=True)
    return response.json()


def events(server: Running, path: str, **body: Any) -> list[dict[str, Any]]:
    with server.http().stream("POST", path, json={"model": "base", "stream": True, **body}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    kind: Any = answers.Completion if path == "/v1/completions" else answers.ChatChunk
    TypeAdapter(list[kind]).validate_python(found, strict=True)
    return found


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["text"]


@pytest.mark.parametrize(
    ("model", "adapters", "wanted"),
    [
        ("base", None, " base"),
        ("legal", None, " legal"),
        ("base:legal", None, " legal"),
        ("legal=1.5", None, " legal*1.5"),
        ("base:legal=0.7+terse=0.3", None, " legal*0.7+terse*0.3"),
        ("legal=.5+terse=-1", None, " legal*0.5+terse*-1"),
        ("legal=1e+0+terse=2", None, " legal*1+terse*2"),
        ("base", {"legal": 0.7, "terse": 0.3}, " legal*0.7+terse*0.3"),
        ("base", {"legal": 2}, " legal*2"),
        ("base", {}, " base"),
    ],
)
def test_the_adapter_is_the_model_or_an_extra_field(
    open_server: Running, model: str, adapters: dict[str, float] | None, wanted: str
) -> None:
    answer = complete(open_server, model=model, max_tokens=2, adapters=adapters)
    assert text_of(answer) == wanted + " 3"
    assert answer["model"] == model


def test_the_name_of_the_base_model_can_be_chosen() -> None:
    settings = HttpSettings(model_name="org/llama:7b", model_aliases=("/models/llama",))
    with running(settings=settings) as server:
        assert next(iter(server.openai().models.list())).id == "org/llama:7b"
        for name, wanted in (("org/llama:7b", "base"), ("base", "base"), ("/models/llama", "base")):
            assert text_of(complete(server, model=name, max_tokens=1)) == f" {wanted}"
            assert text_of(complete(server, model=f"{name}:legal", max_tokens=1)) == " legal"


def test_a_prompt_is_text_or_tokens_or_a_list_of_either(open_server: Running) -> None:
    for prompt, lengths in (
        ("a b", [3]),
        ([5, 6], [2]),
        (["a b", "a"], [3, 2]),
        ([[5], [6, 7, 8]], [1, 3]),
        (["a", [9]], [2, 1]),
    ):
        answer = complete(open_server, prompt=prompt, max_tokens=2)
        assert [choice["text"].split()[1] for choice in answer["choices"]] == [str(length) for length in lengths]
        assert answer["usage"]["prompt_tokens"] == sum(lengths)


def test_choices_of_a_prompt_follow_each_other_and_its_tokens_count_once(open_server: Running) -> None:
    answer = complete(open_server, prompt=["a b", "a"], n=2, seed=7, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [" 7 8", " 8 9", " 7 8", " 8 9"]  # seed, seed + 1
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_default_is_sixteen_tokens_and_a_stop_string_ends_them(open_server: Running) -> None:
    assert complete(open_server)["usage"]["completion_tokens"] == 16
    stopped = complete(open_server, stop=[" 4", " 2"])
    assert (text_of(stopped), stopped["choices"][0]["finish_reason"]) == (" base 3 0 1", "stop")
    assert complete(open_server, stop=" 1", max_tokens=4)["choices"][0]["text"] == " base 3 0"


def test_an_echo_is_the_prompt_as_it_came(open_server: Running) -> None:
    assert text_of(complete(open_server, echo=True, max_tokens=1)) == "a b base"
    assert text_of(complete(open_server, prompt=[35, 36], echo=True, max_tokens=1)).endswith(" base")
    streamed = events(open_server, "/v1/completions", prompt="a b", echo=True, max_tokens=2)
    assert [text_of(event) for event in streamed] == ["a b base", " 3"]


def test_logprobs_name_each_token_and_where_it_begins(open_server: Running) -> None:
    choice = complete(open_server, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert choice["token_logprobs"] == [-0.5, -0.5, -0.5]
    tokenizer = embedded.load_tokenizer()
    assert choice["tokens"] == [tokenizer.decode([token]) for token in (1, 2, 3)]
    assert choice["text_offset"] == [0, 0, 0]  # two special tokens, which are not shown
    entry = converse(open_server, logprobs=True, top_logprobs=3, max_tokens=3)["choices"][0]["logprobs"]["content"][2]
    assert (entry["token"], entry["bytes"]) == ("!", [33])
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5, -2.5, -0.5]  # and the chosen one
    assert converse(open_server, max_tokens=1)["choices"][0]["logprobs"] is None


def test_a_stream_is_the_answer_in_parts(open_server: Running) -> None:
    whole = complete(open_server, prompt=["a b", "a"], n=2, max_tokens=5)
    parts = events(
        open_server, "/v1/completions", prompt=["a b", "a"], n=2, max_tokens=5, stream_options={"include_usage": True}
    )
    *parts, last = parts
    for index in range(4):
        mine = [event["choices"][0] for event in parts if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text_of(whole, index)
        assert [choice["finish_reason"] for choice in mine] == [None] * 4 + ["length"]
    assert all(event["usage"] is None for event in parts)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_a_streamed_chat_begins_with_the_role(open_server: Running) -> None:
    parts = events(open_server, "/v1/chat/completions", messages=HELLO, max_tokens=3, logprobs=True)
    deltas = [event["choices"][0]["delta"] for event in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:]] == ["base", " 13", " 0"]
    assert [len(event["choices"][0]["logprobs"]["content"]) for event in parts] == [0, 1, 1, 1]
    assert [event["choices"][0]["finish_reason"] for event in parts] == [None, None, None, "length"]


def test_a_chat_without_a_template_is_plain_text_that_ends_before_the_next_turn(open_server: Running) -> None:
    messages = [{"role": "system", "content": "Be terse."}, *HELLO, {"role": "assistant", "content": None}, *HELLO]
    converse(open_server, messages=messages, max_tokens=2, stop="!")
    request = open_server.engine.requests[-1]
    tokenizer = embedded.load_tokenizer()
    assert tokenizer.decode(request.prompt_ids, skip_special_tokens=True) == (
        "Be terse.\n\nUser: Hello\nAssistant: \nUser: Hello\nAssistant:"
    )
    assert request.sampling.stop == ("!", "\nUser:")


def test_a_chat_with_a_template_uses_it(open_server: Running) -> None:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with running(tokenizer=tokenizer) as server:
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        converse(server, messages=[{"role": "user", "content": parts}], max_tokens=2)
        request = server.engine.requests[-1]
        assert tokenizer.decode(request.prompt_ids) == "<user>Hello<assistant>"
        assert request.sampling.stop == ()
        refused = server.http().post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "system", "content": "x"}, *HELLO]}
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_a_chat_may_use_what_is_left_of_the_context(open_server: Running) -> None:
    converse(open_server)
    request = open_server.engine.requests[-1]
    assert len(request.prompt_ids) + request.sampling.max_tokens == 512
    converse(open_server, max_tokens=3, max_completion_tokens=2)
    assert open_server.engine.requests[-1].sampling.max_tokens == 2


def test_everything_about_sampling_reaches_the_engine(open_server: Running) -> None:
    plain = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -3, "logprobs": 3, "ignore_eos": True}
    penalties = {"presence_penalty": 1, "frequency_penalty": -1.5, "max_tokens": 4}
    other = {
        "stop": ["x"],
        "stop_token_ids": [9],
        "logit_bias": {"5": -100},
        "include_stop_str_in_output": True,
        "user": "u",
    }
    complete(open_server, **plain, **penalties, **other)
    assert vars(open_server.engine.requests[-1].sampling) == {
        **plain,
        **penalties,
        "stop": ("x",),
        "stop_token_ids": (9,),
        "logit_bias": {5: -100.0},
        "include_stop": True,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "skip_special_tokens": True,
    }


def test_the_seeds_of_choices_stay_within_their_range(open_server: Running) -> None:
    complete(open_server, seed=2**63 - 1, n=2, max_tokens=1)
    assert [request.sampling.seed for request in open_server.engine.requests[-2:]] == [2**63 - 1, -(2**63)]


def test_the_official_client_lists_completes_chats_and_streams(with_keys: Running) -> None:
    client = with_keys.openai(USER_KEY)
    assert [(model.id, model.model_extra["parent"]) for model in client.models.list()] == [
        ("base", None),
        ("legal", "base"),
        ("pirate", "base"),
        ("terse", "base"),
    ]
    assert client.models.retrieve("legal").id == "legal"
    blend = {"adapters": {"legal": 0.7, "terse": 0.3}}
    completion = client.completions.create(model="base", prompt="a b", max_tokens=3, extra_body=blend)
    assert completion.choices[0].text == " legal*0.7+terse*0.3 3 0"
    chat = client.chat.completions.create(model="legal", messages=HELLO, max_tokens=3)
    assert chat.choices[0].message.content == "legal 13 0"
    again = client.chat.completions.create(
        model="legal", messages=[*HELLO, chat.choices[0].message, *HELLO], max_tokens=1, n=2
    )
    assert [choice.message.content for choice in again.choices] == ["legal", "legal"]
    stream = client.chat.completions.create(
        model="legal", messages=HELLO, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "legal 13 0"
    assert chunks[-1].usage.total_tokens == 16


def test_the_official_client_raises_its_own_errors(with_keys: Running) -> None:
    client = with_keys.openai(USER_KEY)
    with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
        client.completions.create(model="nobody", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="512 together") as long:
        client.completions.create(model="base", prompt="a", max_tokens=512)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        with_keys.openai("wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "x"}, cast_to=object)


def test_an_adapter_that_cannot_be_read_is_an_error_before_a_stream_begins() -> None:
    with running(FakeEngine(broken=("legal",))) as server:
        for stream in (False, True):
            response = server.http().post("/v1/completions", json={"model": "legal", "prompt": "a", "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_unusable")
            assert "/srv" not in response.text  # where files lie is nobody's business


def test_what_fails_in_mid_stream_is_the_last_event_and_an_error_of_the_client() -> None:
    with running(FakeEngine(step_s=0.01)) as server:
        stream = server.openai().completions.create(model="legal", prompt="a", max_tokens=400, stream=True)
        seen = [next(stream).choices[0].text]
        server.engine.held.set()
        server.engine.stop()
        with pytest.raises(openai.APIError, match="stopped"):
            seen += [chunk.choices[0].text for chunk in stream]
        assert seen[0] == " legal"


def test_refusals_of_the_engine_come_before_a_stream_and_say_when_to_come_back() -> None:
    engine = FakeEngine(max_queued=1)
    engine.held.set()
    with running(engine) as server:
        body = {"model": "base", "prompt": ["a", "b"], "stream": True}
        response = server.http().post("/v1/completions", json=body)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert response.json()["error"]["code"] == "queue_full"
        until(lambda: engine.num_live == 0)  # the first of the two was cancelled


def test_a_request_that_takes_too_long_is_given_up() -> None:
    engine = FakeEngine(step_s=0.02, max_context_tokens=10**6)
    with running(engine, HttpSettings(request_timeout_s=0.3)) as server:
        asked = {"model": "base", "prompt": "a", "max_tokens": 900_000}
        response = server.http().post("/v1/completions", json=asked)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        until(lambda: _is_given_up_in_mid_stream(server, asked))
        until(lambda: engine.num_live == 0)


def _is_given_up_in_mid_stream(server: Running, asked: dict[str, Any]) -> bool:
    """Whether the stream had begun when its time was over; where not, it is told by its status."""
    try:
        stream = server.openai().completions.create(**asked, stream=True)
    except openai.InternalServerError:
        return False
    with pytest.raises(openai.APIError, match="took more than"):
        list(stream)
    return True


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_cancelled(stream: bool) -> None:
    engine = FakeEngine(step_s=0.005)
    with running(engine) as server:
        body = json.dumps({"model": "base", "prompt": ["a", "b"], "max_tokens": 400, "stream": stream}).encode()
        with server.connect() as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: engine.counts["generated"] > 10)
            engine.held.set()
        until(lambda: engine.num_live == 0 and server.service.gate.num_inside == 0)
        assert engine.counts["cancelled"] == 2


@pytest.mark.parametrize(
    "unasked",
    [
        {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "functions": [], "function_call": "none", "prediction": None, "verbosity": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "top_logprobs": 0},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [], "annotations": [], "refusal": None}]},
    ],
)
def test_what_clients_send_unasked_is_taken(open_server: Running, unasked: dict[str, Any]) -> None:
    body = {"model": "legal", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **unasked}
    response = open_server.http().post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("field", "value", "lacking"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], "no tools"),
        ("tool_choice", "required", "no tools"),
        ("structural_tag", {"type": "structural_tag"}, "but text and JSON"),
        ("modalities", ["text", "audio"], "no outputs but text"),
        ("reasoning_effort", "low", "reasoning"),
    ],
)
def test_what_the_server_lacks_is_refused_by_name(open_server: Running, field: str, value: Any, lacking: str) -> None:
    body = {"model": "legal", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, field: value}
    error = open_server.http().post("/v1/chat/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert lacking in error["message"]


def test_a_value_of_another_kind_is_named_in_words_of_the_api(open_server: Running) -> None:
    http = open_server.http()
    for prompt in ([], None, {"a": 1}):
        error = http.post("/v1/completions", json={"model": "base", "prompt": prompt}).json()["error"]
        assert (error["param"], error["code"]) == ("prompt", "invalid_value")
        assert "validator" not in error["message"]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    body = {"model": "base", "messages": [{"role": "user", "content": image}]}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"].startswith("messages.0.content")
    assert "(" not in error["param"]
    unknown = http.post("/v1/completions", json={"model": "base", "prompt": "a", "promt": "a"}).json()["error"]
    assert (unknown["param"], unknown["code"]) == ("promt", "unknown_parameter")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/v1/models/legal", "/metrics"])
def test_head_is_get_without_a_body(open_server: Running, path: str) -> None:
    http = open_server.http()
    whole, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert http.head("/v1/completions").status_code == 405
    assert http.get(path).status_code == 200  # the connection is still good


def test_pages_elsewhere_may_ask_only_where_they_are_allowed() -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    wants = {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    body = {"model": "base", "prompt": "a", "max_tokens": 1}
    with running() as server:
        assert server.http().options("/v1/completions", headers=asks | wants).status_code == 405
        assert "access-control-allow-origin" not in server.http().get("/v1/models", headers=asks).headers
    with running(settings=HttpSettings(allowed_origins=("https://a.example",)), keys=KEYS) as server:
        http = server.http(USER_KEY)
        leave = http.options("/v1/completions", headers=asks | wants)
        assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert "authorization" in leave.headers["access-control-allow-headers"]
        done = http.post("/v1/completions", json=body, headers={"origin": "https://a.example"})
        assert (done.status_code, done.headers["access-control-allow-origin"]) == (200, "https://a.example")
        refused = server.http().post("/v1/completions", json=body, headers={"origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        other = http.post("/v1/completions", json=body, headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_what_is_left_out_is_as_openai_has_it(open_server: Running) -> None:
    complete(open_server)
    sampling = open_server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, 16)
    assert (sampling.seed, sampling.stop, sampling.logprobs, sampling.ignore_eos) == (None, (), None, False)
    assert (sampling.presence_penalty, sampling.frequency_penalty, dict(sampling.logit_bias)) == (0.0, 0.0, {})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_tells_its_usage_only_where_it_is_asked_for(open_server: Running, path: str) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    for options in ({}, {"stream_options": {"include_usage": False}}):
        parts = events(open_server, path, max_tokens=3, **asked, **options)
        assert all(event["choices"] and event["usage"] is None for event in parts)
    *parts, last = events(open_server, path, max_tokens=3, **asked, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_event_of_a_stream_has_the_usage_so_far_where_it_is_asked_for(open_server: Running, path: str) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = [each["usage"] for each in events(open_server, path, max_tokens=3, n=2, **asked, stream_options=options)]
    counts = [usage["completion_tokens"] for usage in told]
    assert counts == sorted(counts)
    assert {1, 2, 3, 4, 5, 6} <= set(counts)
    assert {usage["prompt_tokens"] for usage in told} == {told[-1]["prompt_tokens"]}
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in told)
    alone = events(open_server, path, max_tokens=3, **asked, stream_options={"continuous_usage_stats": True})
    assert all(event["usage"] is None for event in alone)
