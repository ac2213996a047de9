"""`roadie serve --train` as a process: killed while jobs train, it goes on; and its document is true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from tests.patience import HANG_S, until
from tests.serving.http.harness import free_port
from tests.serving.http.schemathesis import check_document, needs_schemathesis
from tests.train_service.fine_tuning.harness import (
    ADMIN,
    ALICE,
    BASE,
    KEYS,
    answer,
    chats,
    preferences,
    serving,
    upload,
    wait,
)
from tests.versions import NO_ENGINE

from roadie.serving.http.keys import add_to_file, entry_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")]
ROADIE = "import sys; from roadie.cli import main; main()"


@contextmanager
def served(folder: Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[bytes]]]:
    port = free_port()
    options = [
        "--train",
        "--train-state",
        str(folder / "state"),
        "--api-keys",
        str(folder / "keys.yaml"),
        "--port",
        str(port),
    ]
    command = [sys.executable, "-c", ROADIE, "serve", *options]

    def is_ready() -> bool:
        assert running.poll() is None, (folder / "log.txt").read_text()
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    with (folder / "log.txt").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as running:
        try:
            until(is_ready)
            with httpx2.Client(trust_env=False, timeout=HANG_S) as http:
                yield (
                    openai.OpenAI(
                        base_url=f"http://127.0.0.1:{port}/v1", api_key=ALICE, max_retries=0, http_client=http
                    ),
                    running,
                )
        finally:
            running.kill()


CONTENTS = {"supervised": chats("Banana pie."), "dpo": preferences("Yes.", "No.")}


def start(client: openai.OpenAI, kind: str, epochs: int) -> str:
    method = {"type": kind, kind: {"hyperparameters": {"n_epochs": epochs, "batch_size": 4}}}
    file_id = upload(client, CONTENTS[kind])
    return client.fine_tuning.jobs.create(model=BASE, training_file=file_id, method=method, seed=0).id


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_any_moment_jobs_go_on_and_models_are_there(tmp_path: Path) -> None:
    add_to_file(tmp_path / "keys.yaml", entry_of("alice", ALICE, None, is_admin=False))
    with served(tmp_path) as (client, running):
        done = wait(client, start(client, "supervised", 6))
        jobs = {kind: start(client, kind, 15) for kind in CONTENTS}
        until(lambda: all(is_far(client, job_id, 7) for job_id in jobs.values()))
        os.kill(running.pid, signal.SIGKILL)
    with served(tmp_path) as (client, running):
        until(lambda: all(is_far(client, job_id, 17) for job_id in jobs.values()))
        assert answer(client, done.fine_tuned_model).startswith("Banana pie.")
        os.kill(running.pid, signal.SIGKILL)
    with served(tmp_path) as (client, _):
        for kind, job_id in jobs.items():
            job = wait(client, job_id)
            assert job.status == "succeeded", job.error
            events = client.fine_tuning.jobs.list_events(job_id, limit=1000)
            figures = [event.data for event in events if event.type == "metrics"][::-1]
            assert [step["step"] for step in figures] == list(range(1, 31))
            assert figures[-1]["train_loss"] < figures[0]["train_loss"] / 4
            assert client.files.content(job.training_file).read() == CONTENTS[kind]
            assert len(client.files.content(job.result_files[0]).read().splitlines()) == 31
            assert len(client.fine_tuning.jobs.checkpoints.list(job_id, limit=100).data) == 15
        job = client.fine_tuning.jobs.retrieve(jobs["supervised"])
        assert answer(client, job.fine_tuned_model).startswith("Banana pie.")


def is_far(client: openai.OpenAI, job_id: str, steps: int) -> bool:
    page = client.fine_tuning.jobs.list_events(job_id, limit=10)
    return any(event.type == "metrics" and event.data["step"] >= steps for event in page.data)


@needs_schemathesis
@pytest.mark.parametrize("phase", ["coverage,fuzzing", "stateful"])
def test_the_document_is_true_and_nothing_makes_the_server_fail(tmp_path: Path, phase: str) -> None:
    with serving(tmp_path / "state", KEYS) as server:
        client = server.openai(ADMIN)
        file_id = upload(client, chats("Yes.", 1))
        wait(client, client.fine_tuning.jobs.create(model=BASE, training_file=file_id).id)
        check_document(server.url, ADMIN, tmp_path, phase, 12, "--include-path-regex", "^/v1/(files|fine_tuning)")
        assert server.http().get("/health").status_code == 200
