"""`roadie serve` as a process, with the real engine: bad adapters, clients that vanish, kill -9, SIGTERM under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from tests.patience import HANG_S, until
from tests.serving.http.harness import ADMIN_KEY, free_port
from tests.versions import NO_ENGINE

from roadie import embedded
from roadie.serving.http.keys import add_to_file, entry_of

pytestmark = pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")
ROADIE = "import sys; from roadie.cli import main; main()"
KEY = {"authorization": f"Bearer {ADMIN_KEY}"}


@dataclass(frozen=True)
class Process:
    url: str
    running: subprocess.Popen[str]

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=KEY, timeout=HANG_S, trust_env=False)

    def is_ready(self) -> bool:
        assert self.running.poll() is None, "the server ended"
        try:
            return httpx2.get(f"{self.url}/ready", trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Process]:
    port = free_port()
    places = ["--adapters", str(folder / "adapters"), "--api-keys", str(folder / "keys.yaml"), "--port", str(port)]
    command = [sys.executable, "-c", ROADIE, "serve", *places, *options]
    with (folder / "log.txt").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log, text=True) as running:
        try:
            server = Process(f"http://127.0.0.1:{port}", running)
            until(server.is_ready)
            yield server
        finally:
            running.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good adapters, one elsewhere that may be loaded, and everything that may not."""
    folder = tmp_path_factory.mktemp("served")
    adapters, good = folder / "adapters", embedded.adapters_path() / "turtle"
    shutil.copytree(embedded.adapters_path(), adapters)
    for place in ("allowed/other", "forbidden/secret"):
        shutil.copytree(good, folder / place)
    add_to_file(folder / "keys.yaml", entry_of("operator", ADMIN_KEY, None, is_admin=True))
    _make_bad_ones(adapters, good, folder)
    return folder


def _make_bad_ones(adapters: Path, good: Path, folder: Path) -> None:
    for name in ("truncated", "rubbish", "foreign", "pickled", "misfit", "no_config"):
        shutil.copytree(good, adapters / name)
    weights = (good / "adapter_model.safetensors").read_bytes()
    (adapters / "truncated" / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (adapters / "rubbish" / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    (adapters / "foreign" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}'
    )
    (adapters / "pickled" / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, adapters / "pickled" / "adapter_model.bin")
    config = json.loads((adapters / "misfit" / "adapter_config.json").read_text())
    (adapters / "misfit" / "adapter_config.json").write_text(json.dumps(config | {"variant": "road_4"}))
    (adapters / "no_config" / "adapter_config.json").unlink()
    (adapters / "linked").symlink_to(folder / "forbidden" / "secret")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with served(folder, *options_of(folder)) as server:
        yield server


def options_of(folder: Path) -> list[str]:
    places = ["--allow-from", str(folder / "allowed"), "--state", str(folder / "state" / "disk" / "state.json")]
    return [*places, "--drain-timeout", str(HANG_S)]


def load(server: Process, name: str, path: str) -> httpx2.Response:
    with server.client() as client:
        return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def complete(server: Process, model: str, **more: Any) -> httpx2.Response:
    with server.client() as client:
        body = {"model": model, "prompt": "The turtle", "max_tokens": 4, "temperature": 0, **more}
        return client.post("/v1/completions", json=body)


@pytest.fixture(scope="module", autouse=True)
def is_small_disk(folder: Path) -> Iterator[bool]:
    """A place for the state: a disk of 64 KiB where this user may mount one."""
    place = folder / "state" / "disk"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "roadie-test", str(place)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    yield is_mounted
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_every_adapter_answers_and_a_blend_and_all_of_one(server: Process) -> None:
    for model in ("base", "turtle", "asyncio", "topics", "turtle=0.5+topics=0.5", "turtle=-1"):
        response = complete(server, model, logprobs=2)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 4
    plain, whole, none = (
        complete(server, model).json()["choices"] for model in ("turtle", "turtle=1", "base:turtle=0")
    )
    assert whole == plain
    assert none == complete(server, "base").json()["choices"]


@pytest.mark.parametrize("name", ["truncated", "rubbish", "foreign", "pickled", "misfit"])
def test_an_adapter_that_cannot_be_used_is_a_400_when_loaded_and_when_asked_for(server: Process, name: str) -> None:
    for response in (load(server, name, name), complete(server, name), complete(server, f"{name}=0.5+turtle=0.5")):
        assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_unusable"), response.text
    assert complete(server, "turtle").status_code == 200


@pytest.mark.parametrize(
    "path", ["../forbidden/secret", "{folder}/forbidden/secret", "linked", "/etc", "", "turtle/..", "\0", "no_config"]
)
def test_adapters_come_from_allowed_folders_alone(server: Process, folder: Path, path: str) -> None:
    response = load(server, "stolen", path.replace("{folder}", str(folder)))
    assert response.status_code == 400, response.text
    assert complete(server, "stolen").status_code == complete(server, "linked").status_code == 404


def figures(server: Process) -> dict[str, Any]:
    with server.client() as client:
        return client.get("/v1/status").json()["figures"]


def test_clients_that_vanish_in_mid_stream_leave_nothing_behind(server: Process) -> None:
    asyncio.run(vanish(server.url, 60))
    until(lambda: figures(server)["running"] == figures(server)["queued"] == 0)
    after = figures(server)
    assert after["slots_leased"] == 0
    assert after["blocks_free"] == after["blocks"]


async def vanish(url: str, num_streams: int, at_once: int = 8) -> None:
    """Streams of several adapters, hung up on after their first event."""
    room = asyncio.Semaphore(at_once)

    async def once(number: int) -> None:
        model = ("base", "turtle", "topics", "turtle=0.5+topics=0.5")[number % 4]
        body = {"model": model, "prompt": f"Number {number}", "max_tokens": 400, "stream": True, "ignore_eos": True}
        async with (
            room,
            httpx2.AsyncClient(base_url=url, headers=KEY, timeout=HANG_S, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200
            async for _ in response.aiter_bytes():
                break

    await asyncio.gather(*(once(number) for number in range(num_streams)))


def test_a_state_that_cannot_be_written_changes_nothing(server: Process, folder: Path) -> None:
    (folder / "state").rename(folder / "elsewhere")
    try:
        with server.client() as client:
            response = client.post("/v1/adapters/pin", json={"name": "topics"})
            assert (response.status_code, response.json()["error"]["code"]) == (507, "state_not_written")
            adapters = {adapter["name"]: adapter for adapter in client.get("/v1/adapters").json()["data"]}
            assert not adapters["topics"]["pinned"]
    finally:
        (folder / "elsewhere").rename(folder / "state")
    assert complete(server, "topics").status_code == 200


def fill(file: Path) -> None:
    """Write until there is no room."""
    with file.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def test_a_disk_that_is_full_changes_nothing(server: Process, folder: Path, is_small_disk: bool) -> None:
    """A real one, full to its last byte, while the state is written; with room again the same request is served."""
    if not is_small_disk:
        pytest.skip("this user may not mount a file system")
    place = folder / "state" / "disk"
    with server.client() as client:
        assert client.post("/v1/adapters/pin", json={"name": "turtle"}).status_code == 200
        before = (place / "state.json").read_bytes()
        with pytest.raises(OSError, match="No space"):
            fill(place / "filler")
        for _ in range(3):
            response = client.post("/v1/adapters/pin", json={"name": "topics"})
            assert (response.status_code, response.json()["error"]["code"]) == (507, "state_not_written")
            assert "No space left" in response.json()["error"]["message"]
        assert sorted(path.name for path in place.iterdir()) == ["filler", "state.json"]
        assert (place / "state.json").read_bytes() == before
        assert not _states(client)["topics"][1]
        assert complete(server, "topics").status_code == 200
        (place / "filler").unlink()
        assert client.post("/v1/adapters/pin", json={"name": "topics"}).json()["pinned"]
        for name in ("topics", "turtle"):
            assert client.post("/v1/adapters/pin", json={"name": name, "pinned": False}).status_code == 200


def test_a_file_that_shrinks_while_it_is_read_is_refused_or_whole(server: Process, folder: Path) -> None:
    """Written and cut off again and again while it is loaded: what answers is the adapter as it should be, or a 400."""
    give_up_s = time.monotonic() + HANG_S
    shutil.copytree(folder / "adapters" / "turtle", folder / "adapters" / "shrinking")
    weights = folder / "adapters" / "shrinking" / "adapter_model.safetensors"
    whole, stop = weights.read_bytes(), threading.Event()
    wanted = complete(server, "turtle").json()["choices"]

    def shrink() -> None:
        while not stop.is_set():
            os.truncate(weights, len(whole) // 3)
            stop.wait(0.004)
            weights.write_bytes(whole)
            stop.wait(0.004)

    found = set()
    with server.client() as client:
        thread = threading.Thread(target=shrink)
        thread.start()
        try:
            for number in count():
                body = {"name": "shrinking", "replace": True}
                found.add(client.post("/v1/adapters/load", json=body).status_code)
                assert found <= {200, 400}
                if 200 in found and number % 4 == 0:
                    assert complete(server, "shrinking").json()["choices"] == wanted
                if found == {200, 400} and number > 60:
                    break
                assert time.monotonic() < give_up_s, found
        finally:
            stop.set()
            thread.join()


def test_kill_9_and_restart_then_sigterm_under_load(server: Process, folder: Path) -> None:
    """One test, since starting takes seconds: what was loaded and pinned is there again; nothing that was accepted is lost."""
    with server.client() as client:
        assert load(server, "other", str(folder / "allowed" / "other")).status_code == 200
        assert client.post("/v1/adapters/pin", json={"name": "other"}).json()["pinned"]
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "topics"}).status_code == 200
        wanted = complete(server, "other").json()["choices"]
    server.running.send_signal(signal.SIGKILL)
    server.running.wait(HANG_S)
    with served(folder, *options_of(folder)) as again:
        with again.client() as client:
            until(lambda: _states(client).get("other") == ("resident", True))
            assert "topics" not in _states(client)
        assert complete(again, "other").json()["choices"] == wanted
        answers = asyncio.run(_load_and_end(again, 40))
        assert again.running.wait(HANG_S) == 0
    accepted = [answer for answer in answers if answer is not None]
    assert len(accepted) >= 20
    assert set(accepted) == {"length"}


def _states(client: httpx2.Client) -> dict[str, tuple[str, bool]]:
    adapters = client.get("/v1/adapters").json()["data"]
    return {adapter["name"]: (adapter["state"], adapter["pinned"]) for adapter in adapters}


async def _load_and_end(server: Process, num_streams: int) -> list[str | None]:
    """How each stream ended, None for those that were refused; SIGTERM when half of them have begun."""
    begun = 0

    async def once(client: httpx2.AsyncClient, number: int) -> str | None:
        nonlocal begun
        if number >= num_streams // 2:
            await asyncio.sleep(0.02 * (number - num_streams // 2))
        body = {
            "model": ("base", "turtle", "other")[number % 3],
            "prompt": "The",
            "max_tokens": 100,
            "ignore_eos": True,
        }
        request = client.build_request("POST", "/v1/completions", json=body | {"stream": True})
        try:
            response = await client.send(request, stream=True)
        except httpx2.TransportError:  # nobody took it: the server listens no more
            return None
        if response.status_code == 503:
            await response.aclose()
            return None
        assert response.status_code == 200
        begun += 1
        lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]

    async def end() -> None:
        while begun < num_streams // 2:
            await asyncio.sleep(0.005)
        server.running.send_signal(signal.SIGTERM)

    limits = httpx2.Limits(max_connections=num_streams)
    async with httpx2.AsyncClient(
        base_url=server.url, headers=KEY, timeout=HANG_S, trust_env=False, limits=limits
    ) as client:
        *answers, _ = await asyncio.gather(*(once(client, number) for number in range(num_streams)), end())
    return answers
