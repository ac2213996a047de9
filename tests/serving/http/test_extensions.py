"""Routes beside the server's own: behind the same gate, and with adapters that only their owner sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import APIRouter, Request
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import ADMIN_KEY, KEYS, LEGAL_KEY, USER_KEY, Running, running

from roadie.serving.http.extensions import Extension, RunFigures, StepFigures
from roadie.serving.http.gate import MAX_DISCARDED_BYTES, Route, Routes
from roadie.serving.http.settings import HttpSettings

router = APIRouter()
SMALL = 1000


@router.post("/v1/streams/{name}")
async def count(name: str, request: Request) -> dict[str, object]:
    return {"name": name, "parts": [len(part) async for part in request.stream() if part]}


@router.post("/v1/wholes")
async def length(request: Request) -> int:
    return len(await request.body())


ROUTES = {
    "/v1/streams/{name}": Route(is_streamed=True, max_body_bytes=SMALL),
    "/v1/wholes": Route(kinds=("text/plain",), max_body_bytes=SMALL),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    said: list[str] = []
    extension = Extension(
        router, ROUTES, {"terse": "alice"}.get, lambda: said.append("start"), lambda: said.append("stop")
    )
    settings = HttpSettings(max_body_bytes=100, body_timeout_s=0.5)
    with running(FakeEngine(adapter_names=("legal", "terse")), settings, KEYS, extensions=[extension]) as found:
        assert said == ["start"]
        yield found
    assert said == ["start", "stop"]


def test_a_route_is_known_by_its_shape() -> None:
    routes = Routes({**ROUTES, "/v1/models/{model}": Route()})
    assert [routes.of(path) for path in ("/v1/streams/a", "/v1/streams/a/b", "/v1/streams/", "/v1/models/a/b")] == [
        "/v1/streams/{name}",
        "(unknown)",
        "(unknown)",
        "/v1/models/{model}",
    ]


def test_a_body_is_counted_as_it_streams(server: Running) -> None:
    http = server.http(USER_KEY)
    assert http.post("/v1/streams/a", content=b"x" * SMALL).json() == {"name": "a", "parts": [SMALL]}
    parts = (b"y" * 10 for _ in range(3))
    assert sum(http.post("/v1/streams/a", content=parts).json()["parts"]) == 30
    for content in (b"x" * (SMALL + 1), (b"x" * SMALL for _ in range(3))):
        assert http.post("/v1/streams/a", content=content).json()["error"]["code"] == "body_too_long"
    with server.connect() as raw:
        length = SMALL + MAX_DISCARDED_BYTES + 1
        head = f"POST /v1/streams/a HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {USER_KEY}\r\ncontent-length: {length}"
        raw.sendall(f"{head}\r\n\r\nx".encode())
        assert b" 413 " in raw.recv(1000)
    with server.connect() as raw:
        raw.sendall(f"{head.replace(str(length), '9')}\r\n\r\nx".encode())
        assert b" 408 " in raw.recv(1000)


def test_a_route_says_which_bodies_it_takes_and_how_long_they_may_be(server: Running) -> None:
    http = server.http(USER_KEY)
    plain = {"content-type": "text/plain"}
    assert http.post("/v1/wholes", content=b"x" * SMALL, headers=plain).json() == SMALL
    assert http.post("/v1/wholes", content=b"x" * (SMALL + 1), headers=plain).status_code == 413
    assert http.post("/v1/wholes", content=b"x", headers={"content-type": "text/html"}).status_code == 415
    assert http.post("/v1/completions", content=b"x" * 101).status_code == 413
    assert server.http().post("/v1/wholes", content=b"x", headers=plain).status_code == 401


def test_what_trains_is_shown_to_its_own_key() -> None:
    of_alice = RunFigures("a", "training_run", "running", None, 7, 0.5, (StepFigures(1, 2.0, None),))
    parts = [
        Extension(APIRouter(), {}),
        Extension(APIRouter(), {}, runs_of={"alice": [of_alice], "lawyer": []}.__getitem__),
    ]
    with running(FakeEngine(), keys=KEYS, extensions=parts) as server:
        told = {key: server.http(key).get("/v1/status").json()["runs"] for key in (USER_KEY, LEGAL_KEY)}
    steps = [{"step": 1, "loss": 2.0, "reward": None}]
    run = {"id": "a", "kind": "training_run", "state": "running", "num_steps": None, "tokens": 7, "tokens_per_s": 0.5}
    assert told == {USER_KEY: [{**run, "steps": steps}], LEGAL_KEY: []}


def test_an_adapter_of_ones_own_is_nobody_elses(server: Running) -> None:
    seen = {
        key: {model["id"] for model in server.http(key).get("/v1/models").json()["data"]}
        for key in (USER_KEY, LEGAL_KEY, ADMIN_KEY)
    }
    assert {key for key, models in seen.items() if "terse" in models} == {USER_KEY, ADMIN_KEY}
    assert all("legal" in models for models in seen.values())
    for key, status in ((USER_KEY, 200), (LEGAL_KEY, 404)):
        for model in ("terse", "terse=0.5", "legal=0.5+terse=0.5"):
            asked = {"model": model, "prompt": "a", "max_tokens": 1}
            assert server.http(key).post("/v1/completions", json=asked).status_code == status, model
        assert server.http(key).get("/v1/models/terse").status_code == status
