"""A server that ends, in good order or not, goes on with its tenants' runs when it is started again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.patience import HANG_S, until
from tests.serving.http.harness import Running, free_port
from tests.train_service.tinker_server import ALICE, NAME, ROWS, Http, datum, of_server, serving, tinker

from roadie import embedded
from roadie.serving.http.keys import add_to_file, entry_of
from roadie.train_service.tinker_api import records
from roadie.train_service.tinker_api.records import Checkpoint


def losses(http: Http, model: str, first: int, steps: int) -> list[float]:
    ids = []
    for number in range(steps):
        ids.append(http.forward_backward(model, first + 2 * number))
        http.step(model, first + 2 * number + 1)
    return [http.result(id).metrics["loss:sum"] for id in ids]


@pytest.fixture(scope="module")
def model() -> Any:
    return embedded.load_model()


@pytest.fixture(scope="module")
def wanted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing disturbs."""
    with serving(tmp_path_factory.mktemp("undisturbed"), model) as server:
        http = Http(server)
        return losses(http, http.model(), 1, 6)


def kept(server: Running, model: str) -> None:
    service = of_server(server)
    run = service.runs.of(model, "alice")
    run.keep()
    until(lambda: run.kept_seq > 0)


@pytest.mark.parametrize("is_kept", [False, True], ids=["by its requests", "by its state"])
def test_a_run_goes_on(model: Any, wanted: list[float], tmp_path: Path, is_kept: bool) -> None:
    """From its requests alone, or from the state that was kept and the requests since; gradients that wait are there, too."""
    with serving(tmp_path, model) as server:
        http = Http(server)
        run = http.model()
        found = losses(http, run, 1, 3)
        if is_kept:
            kept(server, run)
        last = http.forward_backward(run, 7)
        found.append(http.result(last).metrics["loss:sum"])
        ahead = http.step(run, 10)
        saved = http.ok("save_weights", {"model_id": run, "seq_id": 12, "path": "ahead"})["request_id"]
    with serving(tmp_path, model) as server:
        http = Http(server)
        assert http.result(last).metrics["loss:sum"] == found[-1]
        http.step(run, 8)
        fifth = http.forward_backward(run, 9)
        found.append(http.result(fifth).metrics["loss:sum"])
        assert http.result(ahead)["metrics"]["optim/step"] == 5
        assert http.step(run, 8) == f"{run}:8"
        found.append(http.result(http.forward_backward(run, 11)).metrics["loss:sum"])
        path = http.result(saved)["path"]
        names = [
            each["tinker_path"]
            for each in http.client.get(f"/api/v1/training_runs/{run}/checkpoints").json()["checkpoints"]
        ]
        assert names == [path]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_no_kill_comes_between_an_effect_and_its_answer(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends before it has told of what it has done: it is there once, and so is the answer."""
    with serving(tmp_path, model) as server:
        http = Http(server)
        run = http.model()
        losses(http, run, 1, 1)
        futures = of_server(server).futures
        monkeypatch.setattr(futures, "finish", lambda *_: None)
        saved = [
            http.ok("save_weights", {"model_id": run, "seq_id": 3, "path": "a"})["request_id"],
            http.ok("save_weights_for_sampler", {"model_id": run, "seq_id": 4, "path": "b"})["request_id"],
        ]
        until(lambda: of_server(server).records.count(Checkpoint, "run = ?", (run,)) == 2)
    with serving(tmp_path, model) as server:
        http = Http(server)
        paths = [http.result(id)["path"] for id in saved]
        other = http.model()
        monkeypatch.setattr(of_server(server).futures, "finish", lambda *_: None)
        body = {"model_id": other, "seq_id": 1, "path": paths[0], "optimizer": True}
        loaded = http.ok("load_weights", body)["request_id"]
        until(lambda: of_server(server).records.require(records.Run, other, "alice").kept_seq == 1)
        ended = http.ok("unload_model", {"model_id": run})["request_id"]
    with serving(tmp_path, model) as server:
        http = Http(server)
        assert http.result(loaded)["path"] == paths[0]
        assert http.ok("unload_model", {"model_id": run})["request_id"] == ended
        assert http.result(ended)["model_id"] == run
        found = http.client.get(f"/api/v1/training_runs/{run}/checkpoints").json()["checkpoints"]
        assert sorted(each["tinker_path"] for each in found) == sorted(paths)


def test_samplers_and_samples_go_on(model: Any, tmp_path: Path) -> None:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": ROWS[0][:4]}]}
    body = {"prompt": prompt, "sampling_params": {"max_tokens": 5, "temperature": 0.0}, "seq_id": 0}
    contents: list[list[bytes]] = []

    def sampled(http: Http, sampler: str, seq: int) -> bytes:
        id = http.ok("asample", {**body, "sampling_session_id": sampler, "seq_id": seq})["request_id"]
        while (answer := http.post("retrieve_future", {"request_id": id})).status_code == 408:
            pass
        assert answer.headers["content-type"] == "application/x-protobuf", answer.text
        return answer.content

    with serving(tmp_path, model) as server:
        http = Http(server)
        run = http.model()
        samplers = []
        for number, kind in enumerate(("snapshot", "inflight")):
            losses(http, run, 1 + 5 * number, 2)
            ask = {"model_id": run, "seq_id": 5 + 5 * number, "sampling_session_seq_id": number, "kind": kind}
            samplers.append(http.result(http.ok("save_weights_for_sampler", ask)["request_id"])["sampling_session_id"])
        contents.append([sampled(http, sampler, 0) for sampler in samplers])
        service = of_server(server)
        service.samplers._engine.submit = lambda *_: None  # asked for, and not made before the end
        later = http.ok("asample", {**body, "sampling_session_id": samplers[0], "seq_id": 7})["request_id"]
    with serving(tmp_path, model) as server:
        http = Http(server)
        contents.append([sampled(http, sampler, 1) for sampler in samplers])
        assert [sampled(http, sampler, 0) for sampler in samplers] == contents[0]
        while (answer := http.post("retrieve_future", {"request_id": later})).status_code == 408:
            pass
        contents.append([answer.content, contents[1][1]])
    tokens = [[tokens_of(each) for each in both] for both in contents]
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0][0] != tokens[0][1]


def tokens_of(content: bytes) -> list[int]:
    from tinker.proto.response_conv import deserialize_sample_response

    return list(deserialize_sample_response(content).sequences[0].tokens)


def test_a_disk_that_is_full_is_said_and_nothing_is_half_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roadie.engine import tenants

    with serving(tmp_path, model) as server:
        http = Http(server)
        run = http.model()
        losses(http, run, 1, 1)
        folder = of_server(server).store.root

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(tenants, "save_file", full)
            failed = http.result(http.ok("save_weights", {"model_id": run, "seq_id": 3, "path": "a"})["request_id"])
        assert "disk" in failed["error"]
        assert failed["category"] == "server"
        assert list(folder.iterdir()) == []
        saved = http.result(http.ok("save_weights", {"model_id": run, "seq_id": 4, "path": "a"})["request_id"])
        assert saved["path"].endswith("/weights/a")
        assert losses(http, run, 5, 1)[0] > 0


def test_folders_to_which_nothing_refers_go(model: Any, tmp_path: Path) -> None:
    with serving(tmp_path, model) as server:
        http = Http(server)
        run = http.model()
        path = http.result(http.ok("save_weights", {"model_id": run, "seq_id": 1, "path": "a"})["request_id"])["path"]
        root = of_server(server).store.root
        (root / "left").mkdir()
    with serving(tmp_path, model) as server:
        assert len(list(root.iterdir())) == 1
        body = {"session_id": run.partition(":")[0], "model_seq_id": 5, "path": path, "optimizer": True}
        http = Http(server)
        assert "error" not in http.result(http.ok("load_weights", body)["request_id"])


# As a process, killed.


@dataclass(eq=False)
class Server:
    """`roadie serve --train`, which may be killed and started again."""

    folder: Path
    port: int
    process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "roadie.cli", "serve", "--train", "--train-state", str(self.folder / "state")]
        command += ["--port", str(self.port), "--api-keys", str(self.folder / "keys.yaml"), "--slots", "16"]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        until(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/ready", trust_env=False).status_code == 200
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(HANG_S)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Server]:
    add_to_file(tmp_path / "keys.yaml", entry_of("alice", ALICE, None, is_admin=False))
    server = Server(tmp_path, free_port())
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.long
def test_kills_under_the_sdk_lose_nothing(process: Server, wanted: list[float]) -> None:
    """One client, which knows nothing of it, trains on through kills at random moments; its checkpoints are all there."""
    dice = random.Random(0)
    client = tinker.ServiceClient(base_url=process.url, api_key=ALICE)
    training = client.create_lora_training_client(base_model=NAME, rank=8).result(HANG_S)
    found, paths = [], []
    for number in range(6):
        asked = training.forward_backward([datum(ROWS[0])], "cross_entropy")
        step = training.optim_step(tinker.AdamParams(learning_rate=2e-2, eps=1e-3))
        saved = training.save_state(f"state-{number}")
        if number % 2:
            time.sleep(dice.random() * 0.1)
            process.kill()
            process.start()
        found.append(asked.result(HANG_S).metrics["loss:sum"])
        assert step.result(HANG_S).metrics["optim/step"] == number + 1
        paths.append(saved.result(HANG_S).path)
    process.kill()
    process.start()
    assert found == pytest.approx(wanted, rel=1e-4)
    rest = tinker.RestClient(base_url=process.url, api_key=ALICE)
    listed = [each.tinker_path for each in rest.list_checkpoints(training.model_id).result(HANG_S).checkpoints]
    assert sorted(listed) == sorted(paths)
    again = client.create_training_client_from_state_with_optimizer(paths[2]).result(HANG_S)
    resumed = again.forward_backward([datum(ROWS[0])], "cross_entropy").result(HANG_S)
    assert resumed.metrics["loss:sum"] == pytest.approx(wanted[3], rel=1e-4)
    sampler = training.save_weights_and_get_sampling_client().result(HANG_S)
    process.kill()
    process.start()
    prompt = tinker.ModelInput.from_ints(ROWS[0][:3])
    assert sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=4)).result(HANG_S).sequences[0].tokens
    assert os.listdir(process.folder / "state" / "weights")
