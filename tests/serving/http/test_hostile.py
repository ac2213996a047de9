"""Everything that a server should not do, asked of it: each gets its documented 4xx, and the server goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from tests.patience import until
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import ADMIN_KEY, KEYS, LEGAL_KEY, USER_KEY, Running, running

from roadie.serving.http import answers
from roadie.serving.http.settings import HttpSettings

JSON = {"content-type": "application/json"}
COMPLETE = "/v1/completions"
LOAD = "/v1/load_lora_adapter"


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "base", "prompt": "a", "max_tokens": 1} | changes).encode()


HOSTILE: dict[str, tuple[str, bytes, int, str]] = {
    "no json": (COMPLETE, b"model=base", 400, "invalid_json"),
    "half of it": (COMPLETE, b'{"model": "base", "prompt": "a', 400, "invalid_json"),
    "nothing": (COMPLETE, b"", 400, "missing_parameter"),
    "a list": (COMPLETE, b"[1]", 400, "invalid_value"),
    "bad utf-8": (COMPLETE, b'{"model": "base", "prompt": "\xff\xfe"}', 400, "invalid_json"),
    "utf-16": (COMPLETE, '{"model": "bäse"}'.encode("utf-16"), 400, "missing_parameter"),  # JSON allows it
    "half a surrogate": (COMPLETE, b'{"model": "base", "prompt": "\\ud800"}', 400, "invalid_value"),
    "half a surrogate as model": (COMPLETE, b'{"model": "\\udfff", "prompt": "a"}', 400, "invalid_value"),
    "half a surrogate to stop": (COMPLETE, body(stop="\ud83d"), 400, "invalid_value"),
    "deep": (COMPLETE, b"[" * 200_000, 400, "invalid_json"),
    "deep objects": (COMPLETE, b'{"a":' * 100_000, 400, "invalid_json"),
    "a number of 5000 digits": (
        COMPLETE,
        b'{"model": "base", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        400,
        "invalid_json",
    ),
    "NaN": (COMPLETE, b'{"model": "base", "prompt": "a", "temperature": NaN}', 400, "invalid_value"),
    "infinite": (COMPLETE, b'{"model": "base", "prompt": "a", "top_p": 1e999}', 400, "invalid_value"),
    "unknown field": (COMPLETE, body(promt="a"), 400, "unknown_parameter"),
    "no prompt": (COMPLETE, b'{"model": "base"}', 400, "missing_parameter"),
    "empty list": (COMPLETE, body(prompt=[]), 400, "invalid_value"),
    "empty prompt of tokens": (COMPLETE, body(prompt=[[]]), 400, "invalid_value"),
    "mixed prompts": (COMPLETE, body(prompt=["a", 1]), 400, "invalid_value"),
    "token of another vocabulary": (COMPLETE, body(prompt=[2048]), 400, "invalid_value"),
    "negative token": (COMPLETE, body(prompt=[-1]), 400, "invalid_value"),
    "truth as number": (COMPLETE, body(max_tokens=True), 400, "invalid_value"),
    "text as number": (COMPLETE, body(temperature="0"), 400, "invalid_value"),
    "no tokens": (COMPLETE, body(max_tokens=0), 400, "invalid_value"),
    "a million tokens": (COMPLETE, body(max_tokens=10**6), 400, "context_length_exceeded"),
    "more than an int": (COMPLETE, body(max_tokens=2**31), 400, "invalid_value"),
    "long prompt": (COMPLETE, body(prompt="a " * 1000), 400, "context_length_exceeded"),
    "very long prompt": (COMPLETE, body(prompt="a" * 500_000), 400, "context_length_exceeded"),
    "many choices": (COMPLETE, body(n=128), 400, "invalid_value"),
    "too many choices": (COMPLETE, body(n=10**9), 400, "invalid_value"),
    "many prompts": (COMPLETE, body(prompt=["a"] * 33), 400, "invalid_value"),
    "seed": (COMPLETE, body(seed=2**63), 400, "invalid_value"),
    "bias of no token": (COMPLETE, body(logit_bias={"x": 1}), 400, "invalid_value"),
    "empty stop": (COMPLETE, body(stop=[""]), 400, "invalid_value"),
    "seventeen stops": (COMPLETE, body(stop=["x"] * 17), 400, "invalid_value"),
    "stream options alone": (COMPLETE, body(stream_options={"include_usage": True}), 400, "invalid_value"),
    "logprobs of a prompt in a stream": (COMPLETE, body(prompt_logprobs=1, stream=True), 400, "invalid_value"),
    "likely tokens without end": (COMPLETE, body(prompt_logprobs=21), 400, "invalid_value"),
    "all tokens, at each of a prompt": (COMPLETE, body(prompt_logprobs=-1), 400, "invalid_value"),
    "best of more": (COMPLETE, body(best_of=2), 400, "invalid_value"),
    "unknown model": (COMPLETE, body(model="nobody"), 404, "model_not_found"),
    "path as model": (COMPLETE, body(model="../../etc/passwd"), 404, "model_not_found"),
    "script as model": (COMPLETE, body(model="<script>alert(1)</script>"), 404, "model_not_found"),
    "nul as model": (COMPLETE, body(model="legal\0"), 404, "model_not_found"),
    "format as model": (COMPLETE, body(model="{0.__class__}%s%n"), 404, "model_not_found"),
    "weight of nothing": (COMPLETE, body(model="base:legal="), 400, "invalid_value"),
    "infinite weight": (COMPLETE, body(model="legal=1e999"), 400, "invalid_value"),
    "weight that is no number": (COMPLETE, body(model="legal=nan"), 400, "invalid_value"),
    "huge weight": (COMPLETE, body(adapters={"legal": 1e9}), 400, "invalid_value"),
    "adapters beside an adapter": (COMPLETE, body(model="legal", adapters={"terse": 1}), 400, "invalid_value"),
    "twice the same": (COMPLETE, body(model="legal=1+legal=2"), 400, "invalid_value"),
    "a plus too many": (COMPLETE, body(model="legal=1+"), 400, "invalid_value"),
    "blend of many": (COMPLETE, body(adapters={f"a{number}": 1 for number in range(17)}), 400, "invalid_value"),
    "blend with a stranger": (COMPLETE, body(adapters={"legal": 1, "nobody": 1}), 404, "model_not_found"),
    "no messages": ("/v1/chat/completions", b'{"model": "base", "messages": []}', 400, "invalid_value"),
    "unknown role": (
        "/v1/chat/completions",
        b'{"model":"base","messages":[{"role":"god","content":"x"}]}',
        400,
        "invalid_value",
    ),
    "an image": (
        "/v1/chat/completions",
        b'{"model":"base","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]}]}',
        400,
        "invalid_value",
    ),
    "path escape": (LOAD, b'{"lora_name": "x", "lora_path": "../../etc"}', 400, "adapter_unusable"),
    "absolute path": (LOAD, b'{"lora_name": "x", "lora_path": "/etc/passwd"}', 400, "adapter_unusable"),
    "corrupt adapter": (LOAD, b'{"lora_name": "x", "lora_path": "corrupt"}', 400, "adapter_unusable"),
    "name with a path": (LOAD, b'{"lora_name": "../x", "lora_path": "x"}', 400, "invalid_value"),
    "name with a script": (LOAD, b'{"lora_name": "<img src=x>", "lora_path": "x"}', 400, "invalid_value"),
    "name with a newline": (LOAD, b'{"lora_name": "x\\n", "lora_path": "x"}', 400, "invalid_value"),
    "endless name": (LOAD, json.dumps({"lora_name": "x" * 129, "lora_path": "x"}).encode(), 400, "invalid_value"),
    "unload a stranger": ("/v1/unload_lora_adapter", b'{"lora_name": "nobody"}', 404, "model_not_found"),
    "unload in an unknown way": ("/v1/adapters/unload", b'{"name": "legal", "how": "now"}', 400, "invalid_value"),
    "pin a stranger": ("/v1/adapters/pin", b'{"name": "nobody"}', 404, "model_not_found"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=KEYS) as server:
        yield server


def check_error(response: Any, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    answers.Error.model_validate(response.json(), strict=True)
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_requests_get_their_error(server: Running, case: str) -> None:
    path, content, status, code = HOSTILE[case]
    client = server.http(ADMIN_KEY)
    check_error(client.post(path, content=content, headers=JSON), status, code)
    assert client.get("/ready").status_code == 200
    until(lambda: server.engine.num_live == 0 and server.service.gate.num_inside == 0)


def test_the_corpus_again_and_again_leaves_nothing_behind(server: Running) -> None:
    client = server.http(ADMIN_KEY)

    def once() -> tuple[int, int]:
        for path, content, status, _ in HOSTILE.values():
            assert client.post(path, content=content, headers=JSON).status_code == status
        return len(os.listdir("/proc/self/fd")), server.engine.num_live

    first = once()
    for _ in range(3):
        assert once() == first


def test_too_long_a_prompt_is_told_in_the_words_that_clients_look_for(server: Running) -> None:
    """LiteLLM, LangChain and others know the error by its wording."""
    for case in ("a million tokens", "long prompt", "very long prompt"):
        path, content, _, _ = HOSTILE[case]
        message = server.http(ADMIN_KEY).post(path, content=content, headers=JSON).json()["error"]["message"]
        assert message.startswith("This model's maximum context length is ")
    messages = [{"role": "user", "content": "a " * 1000}]
    error = (
        server.http(ADMIN_KEY)
        .post("/v1/chat/completions", json={"model": "base", "messages": messages})
        .json()["error"]
    )
    assert "This model's maximum context length is 512 tokens. However, you requested" in error["message"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_a_body_that_is_not_said_to_be_json_is_refused(server: Running, kind: str | None) -> None:
    """What a page elsewhere can send without asking is one of these kinds."""
    headers = {} if kind is None else {"content-type": kind}
    check_error(server.http(USER_KEY).post(COMPLETE, content=body(), headers=headers), 415, "not_json")


def test_unknown_routes_and_methods(server: Running) -> None:
    client = server.http(ADMIN_KEY)
    check_error(client.get("/v1/nothing"), 404, "not_found")
    check_error(client.get("/v1/models/"), 404, "not_found")
    check_error(client.get("/page/../../../etc/passwd"), 404, "not_found")
    check_error(client.get("/%2e%2e/%2e%2e/etc/passwd"), 404, "not_found")
    refused = client.delete("/v1/models")
    check_error(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "GET"
    check_error(client.get("/v1/models/..%2F..%2Fetc%2Fpasswd"), 404, "not_found")
    check_error(client.get("/v1/models/nobody"), 404, "model_not_found")


@pytest.mark.parametrize("key", ["wrong", "é" * 32, "x" * 10_000, USER_KEY[:-1], USER_KEY + "x", USER_KEY.upper()])
def test_wrong_keys(server: Running, key: str) -> None:
    headers = [(b"authorization", b"Bearer " + key.encode("latin-1"))]
    for path in ("/v1/models", "/v1/status"):
        response = server.http().get(path, headers=headers)
        check_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    check_error(server.http().post(COMPLETE, content=body(), headers={**JSON}), 401, "invalid_api_key")


def test_a_wrong_key_is_told_before_its_body_is_read() -> None:
    with running(keys=KEYS) as server, server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/adapters/load",
        "/v1/adapters/unload",
        "/v1/adapters/pin",
    ],
)
def test_only_administrators_administer(server: Running, open_server: Running, path: str) -> None:
    check_error(server.http(USER_KEY).post(path, content=b"{}", headers=JSON), 403, "not_an_admin")
    check_error(server.http().post(path, content=b"{}", headers=JSON), 401, "invalid_api_key")
    check_error(open_server.http().post(path, content=b"{}", headers=JSON), 403, "no_admin_keys")


def test_a_key_uses_and_sees_its_adapters_alone(server: Running) -> None:
    client = server.http(LEGAL_KEY)
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "legal"]
    assert [adapter["name"] for adapter in client.get("/v1/adapters").json()["data"]] == ["legal"]
    assert [adapter["name"] for adapter in client.get("/v1/status").json()["adapters"]] == ["legal"]
    assert client.post(COMPLETE, content=body(model="legal=0.5"), headers=JSON).status_code == 200
    forbidden = client.post(COMPLETE, content=body(model="terse"), headers=JSON)
    unknown = client.post(COMPLETE, content=body(model="stranger"), headers=JSON)
    blend = client.post(COMPLETE, content=body(model="legal=0.5+terse=0.5"), headers=JSON)
    for response in (forbidden, unknown, blend):
        check_error(response, 404, "model_not_found")
    assert forbidden.text.replace("terse", "stranger") == unknown.text  # whether it exists is not to be told
    check_error(client.get("/v1/models/terse"), 404, "model_not_found")


def test_metrics_name_adapters_to_administrators_alone(server: Running, open_server: Running) -> None:
    server.http(ADMIN_KEY).post(COMPLETE, content=body(model="pirate"), headers=JSON)
    for key, is_named in ((None, False), (USER_KEY, False), (ADMIN_KEY, True)):
        text = server.http(key).get("/metrics").text
        assert ("pirate" in text) == is_named
        assert "roadie_running_requests 0.0" in text
    open_server.http().post(COMPLETE, content=body(model="pirate"), headers=JSON)
    assert 'roadie_requests_total{adapter="pirate",finish="length"}' in open_server.http().get("/metrics").text


def test_labels_of_adapters_are_so_many_and_no_more() -> None:
    names = tuple(f"a{number}" for number in range(8))
    with running(FakeEngine(adapter_names=names), HttpSettings(max_labelled_adapters=3)) as server:
        client = server.http()
        for name in [*names, "nobody", "a0=0.5"]:
            client.post(COMPLETE, content=body(model=name), headers=JSON)
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("roadie_requests_total")]
        assert [line.split('"')[1] for line in lines] == ["a0", "a1", "a2", "(others)", "(blend)"]
        assert lines[3].endswith(" 5.0")


def test_huge_bodies_are_refused_by_their_length_and_by_what_comes() -> None:
    with running(settings=HttpSettings(max_body_bytes=1000)) as server:
        client = server.http()
        check_error(client.post(COMPLETE, content=b"x" * 1001, headers=JSON), 413, "body_too_long")
        check_error(
            client.post(COMPLETE, content=(b"x" * 100_000 for _ in range(50)), headers=JSON), 413, "body_too_long"
        )
        with server.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert client.post(COMPLETE, content=body(), headers=JSON).status_code == 200


RAW = {
    "rubbish": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 400 "),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"HTTP/1.1 400 "),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
    "a negative length": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 400 "),
    "a long header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000, b"HTTP/1.1 400 "),
    "a bad chunk": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 400 ",
    ),
    "path that is not text": (b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 404 "),
}


def _answer(connection: Any) -> bytes:
    """An answer with the whole of its body, which ends with a brace."""
    got = b""
    while not got.endswith(b"}"):
        part = connection.recv(10_000)
        if not part:
            break
        got += part
    return got


@pytest.mark.parametrize("case", RAW)
def test_what_is_hardly_http_gets_an_error_in_json(open_server: Running, case: str) -> None:
    sent, wanted = RAW[case]
    with open_server.connect() as connection:
        connection.sendall(sent)
        got = _answer(connection)
    assert got.startswith(wanted)
    assert b'"error":' in got
    assert open_server.http().get("/ready").status_code == 200


def test_slow_clients_are_told_and_let_go() -> None:
    settings = HttpSettings(header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_s=1)
    with running(settings=settings) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for sent in (b"", b"GE", head, head + b"Content-Length: 30\r\n\r\n{"):
            with server.connect() as connection:
                connection.sendall(sent)
                assert connection.recv(10_000).startswith(b"HTTP/1.1 408 ")
                while connection.recv(10_000):
                    pass  # closed
        until(lambda: _is_let_go_after_an_answer_too(server))
        until(lambda: not server.server.server_state.connections)


def _is_let_go_after_an_answer_too(server: Running) -> bool:
    """Whether a first request was quick enough to be answered; the second, which is not whole, is told so."""
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        if _answer(connection).startswith(b"HTTP/1.1 408 "):
            return False
        connection.sendall(b"GET /hea")
        assert _answer(connection).startswith(b"HTTP/1.1 408 ")
        return True


def test_a_client_that_takes_nothing_of_its_stream_is_cut_off() -> None:
    engine = FakeEngine(max_context_tokens=10**6)
    with running(engine, HttpSettings(write_timeout_s=0.3)) as server, server.connect() as connection:
        sent = body(max_tokens=900_000, stream=True, prompt=["a"] * 8)
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        connection.sendall(head.encode() + sent)
        until(lambda: engine.counts["cancelled"] == 8)
        assert engine.num_live == 0


def test_more_than_there_is_room_for_is_told_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.held.set()
    settings = HttpSettings(max_concurrent_requests=3, max_concurrent_per_key=2)
    with running(engine, settings, KEYS) as server:
        streams = [_begin(server, USER_KEY), _begin(server, USER_KEY)]
        until(lambda: engine.num_live == 2)
        mine = server.http(USER_KEY).post(COMPLETE, content=body(), headers=JSON)
        check_error(mine, 429, "too_many_requests")
        assert int(mine.headers["retry-after"]) >= 1
        streams.append(_begin(server, ADMIN_KEY))
        until(lambda: engine.num_live == 3)
        check_error(server.http(LEGAL_KEY).post(COMPLETE, content=body(), headers=JSON), 429, "too_many_requests")
        assert server.http().get("/health").status_code == 200
        engine.held.clear()
        for connection in streams:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()
        assert server.http(USER_KEY).post(COMPLETE, content=body(), headers=JSON).status_code == 200


def _begin(server: Running, key: str) -> Any:
    connection = server.connect()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(body())}\r\n\r\n".encode() + body())
    return connection


def test_too_many_connections_are_refused_in_json() -> None:
    with running(settings=HttpSettings(max_connections=3)) as server:
        held = [server.connect() for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        with server.connect() as one_more:
            assert one_more.recv(10_000).startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        until(lambda: not server.server.server_state.connections)
        assert server.http().get("/health").status_code == 200


def test_another_host_is_refused_where_hosts_are_listed() -> None:
    with running(settings=HttpSettings(allowed_hosts=("127.0.0.1", "[::1]", "localhost"))) as server:
        client = server.http()
        for host, status in (
            ("evil.example", 403),
            ("localhost:1", 200),
            ("[::1]:80", 200),
            ("127.0.0.1", 200),
            ("LOCALHOST", 200),
        ):
            assert client.get("/health", headers={"host": host}).status_code == status


def test_what_nobody_foresaw_is_an_error_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(failing=KeyError("my secret prompt"))
    with running(engine) as server:
        response = server.http().post(COMPLETE, content=body(), headers=JSON)
        check_error(response, 500, "internal_error")
        assert server.http().get("/health").status_code == 200
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text + response.text


def test_neither_prompts_nor_keys_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", logger="roadie")  # a command line that ran before may have set it
    with running(keys=KEYS) as server:
        client = server.http(ADMIN_KEY)
        for content in (body(prompt="my secret prompt"), body(prompt=["my secret prompt", 1]), b'"my secret prompt'):
            client.post(COMPLETE + "?prompt=secret", content=content, headers=JSON)
        client.post(LOAD, content=b'{"lora_name": "x", "lora_path": "secret/corrupt"}', headers=JSON)
    own = [record.getMessage() for record in caplog.records if record.name.startswith(("roadie", "uvicorn"))]
    assert any("operator POST /v1/completions 200" in line for line in own)
    assert not [line for line in own if "secret" in line or ADMIN_KEY in line]


def test_a_server_that_stops_says_so() -> None:
    engine = FakeEngine(step_s=0.01)
    with running(engine) as server:
        client = server.http()
        stream = server.openai().completions.create(model="base", prompt="a", max_tokens=60, stream=True)
        first = next(stream)
        engine.held.set()
        server.server.end()
        until(lambda: not server.service.gate.is_open)
        check_error(client.get("/ready"), 503, "not_ready")
        refused = client.post(COMPLETE, content=body(), headers=JSON)
        check_error(refused, 503, "shutting_down")
        assert "retry-after" in refused.headers
        engine.held.clear()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert len([first, *rest]) == 60
    assert server.server.has_answered_all


def test_a_state_that_cannot_be_written_is_the_servers_fault() -> None:
    with running(keys=KEYS) as server:
        response = server.http(ADMIN_KEY).post(LOAD, content=b'{"lora_name": "x", "lora_path": "full"}', headers=JSON)
        check_error(response, 507, "state_not_written")


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/health", 200), ("/v1/models", 401), ("/nowhere", 404), ("/v1/completions", 405)]
)
def test_every_answer_has_an_id_and_keeps_browsers_from_guessing(server: Running, path: str, status: int) -> None:
    key = ADMIN_KEY if status == 405 else None
    first, second = (server.http(key).get(path) for _ in range(2))
    assert first.status_code == status
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["referrer-policy"] == "no-referrer"
    assert first.headers["cross-origin-resource-policy"] == "same-origin"
    assert len({first.headers["x-request-id"], second.headers["x-request-id"]}) == 2
