"""What a client may do that the SDK does not: requests out of order and again, other tenants' ids, garbage."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.patience import until
from tests.serving.http.harness import Running
from tests.serving.http.schemathesis import check_document, needs_schemathesis
from tests.train_service.tinker_server import (
    ALICE,
    BOB,
    NAME,
    PROTOBUF,
    ROWS,
    Http,
    message,
    of_server,
    serving,
    tinker,
)

from roadie.serving.http.gate import UNKNOWN

routes = pytest.importorskip("roadie.train_service.tinker_api.routes")
API, LACKING = routes.API, routes.LACKING


@pytest.fixture(scope="module")
def alice(server: Running) -> Http:
    return Http(server)


@pytest.fixture(scope="module")
def bob(server: Running) -> Http:
    return Http(server, BOB)


def losses(http: Http, model: str, order: Callable[[list[tuple[str, int]]], Any]) -> list[float]:
    """Of two steps over other rows, each asked for in this order."""
    asked = [
        ("forward_backward", 1),
        ("optim_step", 2),
        ("forward_backward", 3),
        ("optim_step", 4),
        ("forward_backward", 5),
    ]
    ids: dict[int, set[str]] = {}
    for kind, seq in order(asked):
        id = http.forward_backward(model, seq, ROWS[seq % 2]) if kind == "forward_backward" else http.step(model, seq)
        ids.setdefault(seq, set()).add(id)
    assert all(len(same) == 1 for same in ids.values())
    return [http.result(*ids[seq]).metrics["loss:sum"] for seq in (1, 3, 5)]


def test_the_order_is_that_of_seq_id(alice: Http) -> None:
    wanted = losses(alice, alice.model(), lambda asked: asked)
    for order in (
        lambda asked: asked[::-1],
        lambda asked: asked * 2,
        lambda asked: [*asked[1:], *asked[:2], *asked[::-1]],
    ):
        assert losses(alice, alice.model(), order) == pytest.approx(wanted, rel=1e-5)


def test_a_model_and_a_sampler_that_are_asked_for_again_are_the_same(alice: Http) -> None:
    session = alice.session()
    assert alice.model(session, 3) == alice.model(session, 3) == f"{session}:train:3"
    body = {"session_id": session, "sampling_session_seq_id": 1, "base_model": NAME}
    samplers = [alice.ok("create_sampling_session", body)["sampling_session_id"] for _ in range(2)]
    assert len(set(samplers)) == 1
    ask = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": ROWS[0][:3]}]},
        "sampling_params": {"max_tokens": 3, "temperature": 1.0},
        "sampling_session_id": samplers[0],
        "seq_id": 0,
    }
    asked = [alice.ok("asample", ask) for _ in range(3)]
    assert len({each["request_id"] for each in asked}) == 1
    assert asked[0]["sample_sequence_ids"] == asked[2]["sample_sequence_ids"]
    contents = set()
    for _ in range(2):
        while (answer := alice.post("retrieve_future", {"request_id": asked[0]["request_id"]})).status_code == 408:
            pass
        contents.add(answer.content)
    assert len(contents) == 1


def test_what_fails_is_one_request(alice: Http) -> None:
    """Its seq_id is used up: those behind it go on."""
    model = alice.model()
    wrong = alice.forward_backward(model, 1, [1, 10**6])
    good = alice.forward_backward(model, 2)
    assert "datum" in alice.result(wrong)["error"] or "row 0" in alice.result(wrong)["error"]
    assert alice.result(wrong)["category"] == "user"
    assert alice.result(good).metrics["loss:sum"] > 0


@pytest.fixture(scope="module")
def things(alice: Http) -> dict[str, str]:
    """Ids of all kinds that alice has."""
    session = alice.session()
    model = alice.model(session)
    future = alice.forward_backward(model, 1)
    saved = alice.result(alice.ok("save_weights", {"model_id": model, "path": "mine", "seq_id": 2})["request_id"])[
        "path"
    ]
    body = {"model_id": model, "sampling_session_seq_id": 0, "seq_id": 3}
    sampler = alice.result(alice.ok("save_weights_for_sampler", body)["request_id"])["sampling_session_id"]
    return {"session": session, "model": model, "future": future, "path": saved, "sampler": sampler}


def everything(things: dict[str, str]) -> list[tuple[str, str, Any]]:
    """Each request that names something."""
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    params = {"max_tokens": 1}
    model, session, path = things["model"], things["session"], things["path"]
    run = f"training_runs/{model}"
    one = path.removeprefix(f"tinker://{model}/")
    return [
        ("POST", "session_heartbeat", {"session_id": session}),
        ("POST", "create_model", {"session_id": session, "model_seq_id": 9, "base_model": NAME}),
        ("POST", "load_weights", {"session_id": session, "model_seq_id": 9, "path": path, "optimizer": False}),
        ("POST", "load_weights", {"model_id": model, "seq_id": 9, "path": path, "optimizer": False}),
        ("POST", "optim_step", {"model_id": model, "seq_id": 9, "adam_params": {}}),
        ("POST", "save_weights", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "save_weights_for_sampler", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "save_weights_external", {"model_id": model, "seq_id": 9, "path": "x"}),
        ("POST", "get_info", {"model_id": model}),
        ("POST", "unload_model", {"model_id": model}),
        ("POST", "weights_info", {"tinker_path": path}),
        ("POST", "retrieve_future", {"request_id": things["future"]}),
        ("POST", "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 9, "base_model": NAME}),
        ("POST", "join_sampling_session", {"sampling_session_id": things["sampler"]}),
        ("POST", "asample", {"sampling_session_id": things["sampler"], "seq_id": 9, "prompt": prompt, "sampling_params": params}),
        ("POST", "asample", {"model_path": path, "prompt": prompt, "sampling_params": params}),
        ("GET", run, None),
        ("GET", f"{run}/checkpoints", None),
        ("DELETE", f"{run}/checkpoints/{one}", None),
        ("PUT", f"{run}/checkpoints/{one}/ttl", {"ttl_seconds": 5000}),
        ("GET", f"{run}/checkpoints/{one}/archive", None),
        ("GET", f"{run}/checkpoints/{one}/external_weights_urls", None),
        ("GET", f"sessions/{session}", None),
        ("POST", f"sessions/{session}/finish", {}),
        ("GET", f"samplers/{things['sampler']}", None),
    ]  # fmt: skip


def test_another_tenant_sees_what_does_not_exist(alice: Http, bob: Http, things: dict[str, str]) -> None:
    """The same answers, up to the id that was asked for."""
    none = {
        name: id.replace(id[:40], "0" * 40) if name != "path" else id.replace(id[9:49], "0" * 40)
        for name, id in things.items()
    }
    for (method, path, body), (_, elsewhere, other) in zip(everything(things), everything(none), strict=True):
        found = [
            bob.client.request(method, f"/api/v1/{each}", json=content)
            for each, content in ((path, body), (elsewhere, other))
        ]
        assert [answer.status_code for answer in found] == [404, 404], (path, found[0].text)
        assert shape(found[0].text, things) == shape(found[1].text, none), path
    body = {"sampling_session_id": things["sampler"]}
    assert (
        alice.ok("join_sampling_session", body)["client_counter"] == 1
    )  # which only the owner's questions have raised
    for path in ("training_runs", "checkpoints", "sessions"):
        assert things["model"].partition(":")[0] not in bob.client.get(f"/api/v1/{path}?limit=1000").text
        assert things["model"].partition(":")[0] in alice.client.get(f"/api/v1/{path}?limit=1000").text
    names = [model["id"] for model in bob.client.get("/v1/models").json()["data"]]
    assert not any(name.startswith("~alice/") for name in names)
    (own,) = [
        model["id"] for model in alice.client.get("/v1/models").json()["data"] if model["id"].startswith("~alice/")
    ]
    asked = {"model": own, "prompt": "a", "max_tokens": 1}
    assert alice.client.post("/v1/completions", json=asked).status_code == 200
    assert bob.client.post("/v1/completions", json=asked).status_code == 404
    assert alice.result(things["future"]).metrics["loss:sum"] > 0


def shape(text: str, ids: dict[str, str]) -> str:
    for id in sorted(ids.values(), key=len, reverse=True):
        text = text.replace(id, "ID")
    return text


def test_without_a_key_there_is_nothing(server: Running, things: dict[str, str]) -> None:
    client = server.http()
    for method, path, body in everything(things):
        assert client.request(method, f"/api/v1/{path}", json=body).status_code == 401, path
    assert client.get("/api/v1/healthz").json() == {"status": "ok"}


def garbage(model: str) -> Iterator[tuple[str, bytes]]:
    yield "no message", b"\xff" * 40
    yield "cut", message(model, 100)[:-7]
    yield "a seq_id of 0", message(model, 0)
    yield "another's model", message("nobody:train:0", 1)
    yield "empty", b""


def test_garbage_is_the_callers_fault(alice: Http, things: dict[str, str]) -> None:
    for name, content in garbage(things["model"]):
        answer = alice.client.post("/api/v1/forward_backward", content=content, headers=PROTOBUF)
        assert 400 <= answer.status_code < 500, name
    assert alice.client.post("/api/v1/forward_backward", json={}).status_code in (400, 404)
    answer = alice.client.post("/api/v1/forward_backward", content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415


@given(data=st.data())
def test_bytes_that_are_wrong_somewhere_break_nothing(alice: Http, things: dict[str, str], data: st.DataObject) -> None:
    content = bytearray(message(things["model"], 7))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    answer = alice.client.post("/api/v1/forward_backward", content=bytes(content), headers=PROTOBUF)
    assert answer.status_code < 500


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(NAME)


@given(data=st.data())
def test_no_json_is_answered_with_a_failure_of_the_server(
    alice: Http, things: dict[str, str], data: st.DataObject
) -> None:
    """Whatever stands in one of the places of a request that is right."""
    method, path, body = data.draw(st.sampled_from([each for each in everything(things) if each[2] is not None]))
    if "unload" in path or "finish" in path:
        return
    names = [*body, "sampling_params", "num_samples", "ttl_seconds", "user_metadata", "topk_sample_logprobs"]
    changed = {**body, data.draw(st.sampled_from(names)): data.draw(_SCALARS | st.lists(_SCALARS, max_size=2))}
    content = json.dumps(changed).encode()
    answer = alice.client.request(
        method, f"/api/v1/{path}", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code < 500, (path, changed, answer.text)
    name = quote(data.draw(st.text(max_size=20)), safe="")
    assert alice.client.get(f"/api/v1/training_runs/{name}").status_code < 500


def test_what_is_not_here_is_said_by_name(alice: Http, things: dict[str, str]) -> None:
    for path, method in ((path, method) for path, (methods, _) in LACKING.items() for method in methods.split()):
        answer = alice.client.request(method, f"/api/v1/{path.format(session='s')}", json={})
        assert answer.status_code == 400
        assert path in answer.json()["error"]["message"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    for lacking in ({"prompt_alt_tokens_k": 2}, {"record_stability_info": True}):
        body = {"base_model": NAME, "prompt": prompt, "sampling_params": {}, **lacking}
        assert next(iter(lacking)) in alice.post("asample", body).json()["error"]["message"]


def test_whatever_the_sdk_asks_for_is_answered(server: Running) -> None:
    """Every path that its code names is a route of this server, or refused by name."""
    text = "".join(
        path.read_text() for path in Path(tinker.__file__).parent.rglob("*.py") if not path.name.endswith("_test.py")
    )
    paths = {re.sub(r"{.*?}", "x", path) for path in re.findall(r'f?"(/api/v1/[\w/{}]+)"', text)}
    assert {"/api/v1/asample", "/api/v1/sessions/x/trace_export", "/api/v1/training_runs/x/checkpoints/x/ttl"} <= paths
    shorter = {path.replace("/checkpoints/x", "/checkpoints/x/x") for path in paths}  # a checkpoint's id has a slash
    assert {path for path in shorter if server.service.gate.routes.of(path) == UNKNOWN} == set()


def test_who_was_not_tried_is_told(alice: Http) -> None:
    def said(version: str) -> str | None:
        body = {"tags": [], "user_metadata": {}, "sdk_version": version}
        return alice.ok("create_session", body)["warning_message"]

    assert said("0.25.0") is said("0.38.1") is None
    for version in ("0.24.1", "0.39.0", "1.30.0", "of my own"):
        assert version in str(said(version))


def test_a_model_that_is_unloaded_is_over(alice: Http) -> None:
    model = alice.model()
    first = alice.forward_backward(model, 1)
    asked = alice.ok("unload_model", {"model_id": model})["request_id"]
    assert alice.result(asked) == {"model_id": model, "type": "unload_model"}
    assert alice.post("optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}}).status_code == 404
    assert alice.client.get(f"/api/v1/training_runs/{model}").status_code == 200
    assert alice.result(first) is not None


@pytest.mark.slow
def test_many_futures_leave_nothing_behind(alice: Http, server: Running) -> None:
    from roadie.train_service.tinker_api import futures

    model, before = alice.model(), of_server(server).futures.num_waiting
    ids = [alice.ok("save_weights_for_sampler", {"model_id": model, "seq_id": 1, "path": "a"})["request_id"]]
    ids += [alice.step(model, seq) for seq in range(2, 1000)]
    assert ["error" in alice.result(id) for id in ids] == [False, *[True] * 998]
    service = of_server(server)
    assert service.futures.num_waiting == before
    service.sweep()  # the run keeps its state, and then lets its requests go
    until(lambda: not service.futures.of_owner(model, service.runs.of(model, "alice").kept_seq))
    service.sweep(time.time() + futures.KEPT_AFTER_FETCH_S + 1)
    until(lambda: not any(service.futures.exists(id) for id in ids))
    assert alice.post("retrieve_future", {"request_id": ids[0]}).status_code == 404
    assert alice.step(model, 5) == ids[4]  # asked once more, it is not done once more
    assert service.futures.num_waiting == before


def test_metadata_is_listed_as_words(alice: Http) -> None:
    """The SDK's types take any JSON for it and give words alone."""
    told = {"name": "a", "group_size": 16, "nested": {"letters": ["b", None]}}
    words = {"name": "a", "group_size": "16", "nested": '{"letters": ["b", null]}'}
    body = {"tags": [], "user_metadata": told, "sdk_version": "0.38.0"}
    session = alice.ok("create_session", body)["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": NAME, "user_metadata": told}
    asked = alice.ok("create_model", body)
    alice.result(asked["request_id"])
    assert alice.client.get(f"/api/v1/sessions/{session}").json()["user_metadata"] == words
    assert alice.client.get(f"/api/v1/training_runs/{asked['model_id']}").json()["user_metadata"] == words


def test_expired_checkpoints_go(alice: Http, server: Running) -> None:
    model = alice.model()
    path = alice.result(alice.ok("save_weights", {"model_id": model, "seq_id": 1, "ttl_seconds": 3600})["request_id"])[
        "path"
    ]
    service = of_server(server)
    folder = service.store.path(service.records.checkpoint_at(path, "alice").folder)
    assert folder.exists()
    service.sweep(time.time() + 3601)
    until(lambda: not folder.exists())
    assert alice.post("weights_info", {"tinker_path": path}).status_code == 404


@needs_schemathesis
@pytest.mark.slow
def test_the_document_of_these_routes_is_true(tmp_path: Path) -> None:
    """forward_backward takes protobuf alone, of which schemathesis knows nothing; the SDK's types take 0 for false."""
    with serving(tmp_path) as server:
        http = Http(server)
        model = http.model()
        http.result(http.forward_backward(model, 1, ROWS[0]))
        asked = ("--include-path-regex", f"^{API}/", "--exclude-path", f"{API}/forward_backward")
        asked += ("--exclude-checks", "negative_data_rejection")
        check_document(server.url, ALICE, tmp_path, "coverage,fuzzing", 6, *asked)
        assert http.result(http.forward_backward(model, 2, ROWS[0])).metrics["loss:sum"] > 0
