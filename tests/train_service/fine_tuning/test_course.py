"""What becomes of a job on its way: paused, resumed, cancelled, out of disk, out of turns, in a server that ends."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from tests.patience import HANG_S, until
from tests.serving.http.harness import Running
from tests.train_service.fine_tuning.harness import (
    ALICE,
    BASE,
    BOB,
    KEYS,
    answer,
    chats,
    preferences,
    serving,
    upload,
    wait,
)
from tests.versions import NO_ENGINE

from roadie.engine import TenantState, TrainingSettings
from roadie.errors import ShuttingDown, StateNotWritten
from roadie.train_service.database import Database
from roadie.train_service.fine_tuning import course
from roadie.train_service.fine_tuning.data import Reader
from roadie.train_service.fine_tuning.jobs import Jobs
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.runner import whose_turn

pytestmark = pytest.mark.skipif(NO_ENGINE, reason="the engine needs a newer transformers")
PIE = "Banana pie."


def start(client: openai.OpenAI, content: bytes, kind: str = "supervised", **more: Any) -> Any:
    hyperparameters = {"n_epochs": 6, "batch_size": 4}
    method = {"type": kind, kind: {"hyperparameters": hyperparameters}}
    return client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client, content), method=method, seed=1, **more
    )


def losses(client: openai.OpenAI, job_id: str) -> list[tuple[int, float]]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=1000)
    return [(event.data["step"], event.data["train_loss"]) for event in events if event.type == "metrics"][::-1]


class Held(threading.Event):
    """Set when the runner stands still; databases: of the service that does."""

    def __init__(self) -> None:
        super().__init__()
        self.databases: list[Database] = []


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[Held]:
    """The runner stands still when a job has done so many steps, until the block ends."""
    here, go_on, note = Held(), threading.Event(), Jobs.note_step

    def note_step(self: Jobs, job_id: str, message: str, data: Any) -> None:
        note(self, job_id, message, data)
        if data["step"] == step and not go_on.is_set():
            here.databases = [self._database]
            here.set()
            assert go_on.wait(HANG_S)

    with monkeypatch.context() as patched:
        patched.setattr(Jobs, "note_step", note_step)
        try:
            yield here
        finally:
            go_on.set()


@pytest.mark.parametrize(("kind", "content"), [("supervised", chats(PIE)), ("dpo", preferences("Yes.", PIE))])
def test_a_job_that_was_paused_goes_on_as_if_nothing_had_been(
    server: Running, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes
) -> None:
    client = server.openai(ALICE)
    whole = wait(client, start(client, content, kind).id)
    with held(monkeypatch, 3) as here:
        job = start(client, content, kind)
        assert here.wait(HANG_S)
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        with pytest.raises(openai.BadRequestError, match="which is paused"):
            client.fine_tuning.jobs.pause(job.id)
    until(lambda: server.engine.training.tenants == ())
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert [step for step, _ in losses(client, job.id)] == [1, 2, 3]
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    job = wait(client, job.id)
    assert (job.status, job.trained_tokens) == ("succeeded", whole.trained_tokens)
    assert [step for step, _ in losses(client, job.id)] == list(range(1, 13))
    assert losses(client, job.id) == losses(client, whole.id)  # the same batches, alone as well: the same bits
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert {"Fine-tuning job paused", "Fine-tuning job resumed"} <= set(messages)


def test_a_job_that_is_cancelled_ends_and_its_epochs_stay(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = server.openai(ALICE)
    with held(monkeypatch, 5) as here:
        job = start(client, chats(PIE))
        assert here.wait(HANG_S)
        with pytest.raises(openai.ConflictError, match=job.id):
            client.files.delete(job.training_file)
        cancelled = client.fine_tuning.jobs.cancel(job.id)
        assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    until(lambda: server.engine.training.tenants == ())
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert [step for step, _ in losses(client, job.id)] == [1, 2, 3, 4, 5]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [each.step_number for each in checkpoints] == [4, 2]
    assert answer(client, checkpoints[0].fine_tuned_model_checkpoint) is not None
    for verb in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="which is cancelled"):
            verb(job.id)
    assert client.files.delete(job.training_file).deleted


def test_a_job_that_is_to_go_on_from_a_model_that_is_gone_fails(server: Running) -> None:
    client = server.openai(BOB)
    model = wait(client, start(client, chats(PIE, 2)).id).fine_tuned_model
    jobs = server.service.extensions[0].owner_of.__self__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(course, "validate", _forgetting(jobs, model, course.validate))
        patched.setattr("roadie.train_service.fine_tuning.runner.validate", course.validate)
        job = client.fine_tuning.jobs.create(model=model, training_file=upload(client, chats(PIE, 2)))
        job = wait(client, job.id)
    assert (job.status, job.error.code, job.error.param) == ("failed", "model_not_found", "model")


def _forgetting(jobs: Jobs, model: str, validate: Any) -> Any:
    def forget_and_validate(*arguments: Any) -> Any:
        jobs.places.pop(model)
        return validate(*arguments)

    return forget_and_validate


def test_rows_that_are_cut_are_told_of(server: Running) -> None:
    client = server.openai(BOB)
    job = wait(client, start(client, chats(PIE, 2) + chats("word " * 1000, 1)).id)
    warnings = [
        event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.level == "warn"
    ]
    assert warnings == ["1 of 3 rows are longer than 512 tokens, and are cut"]


def test_a_job_may_be_paused_before_its_files_are_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, go_on, read = server.openai(BOB), threading.Event(), Reader.read

    def wait_and_read(*arguments: Any) -> Any:
        assert go_on.wait(HANG_S)
        return read(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "read", wait_and_read)
        job = start(client, chats(PIE, 2))
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        assert client.fine_tuning.jobs.resume(job.id).status == "validating_files"
        client.fine_tuning.jobs.pause(job.id)
        go_on.set()
        client.fine_tuning.jobs.resume(job.id)
        assert wait(client, job.id).status == "succeeded"


def test_a_full_disk_fails_the_job_and_not_the_server(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: TenantState, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    client = server.openai(ALICE)
    with monkeypatch.context() as patched:
        patched.setattr(TenantState, "save", save)
        job = wait(client, start(client, chats(PIE)).id)
    assert (job.status, job.error.code) == ("failed", "server_error")
    assert "could not write, or read" in job.error.message
    until(lambda: server.engine.training.tenants == ())
    assert wait(client, start(client, chats(PIE)).id).status == "succeeded"


def _fill(jobs: Jobs) -> None:
    while True:
        jobs.say("nobody", ["x" * 1000])


def test_a_failure_that_cannot_be_written_down_is_written_down_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as server:
        client = server.openai()
        with held(monkeypatch, 3) as here:
            job = start(client, chats(PIE))
            assert here.wait(HANG_S)
            (database,) = here.databases
            ((pages,),) = database.rows("PRAGMA page_count")
            database.rows(f"PRAGMA max_page_count = {pages}")  # a disk that is full for the database
            with pytest.raises(StateNotWritten):
                _fill(Jobs(database, tmp_path))
        until(lambda: server.engine.training.tenants == ())
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        with pytest.raises(openai.InternalServerError) as raised:
            client.fine_tuning.jobs.create(model=BASE, training_file=job.training_file)
        assert (raised.value.status_code, raised.value.code) == (507, "state_not_written")
        database.rows("PRAGMA max_page_count = 1000000")
        job = wait(client, job.id)
        assert (job.status, job.error.code) == ("failed", "server_error")


def test_jobs_wait_while_the_engine_has_no_room_for_them(tmp_path: Path) -> None:
    with serving(tmp_path, training=TrainingSettings(max_tenants=1)) as server:
        client = server.openai()
        jobs = [start(client, chats(PIE)) for _ in range(3)]
        assert [wait(client, job.id).status for job in jobs] == ["succeeded"] * 3


def test_a_key_has_as_many_jobs_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, KEYS, Limits(max_unfinished=2)) as server:
        client = server.openai(ALICE)
        with held(monkeypatch, 1) as here:
            jobs = [start(client, chats(PIE)) for _ in range(2)]
            assert here.wait(HANG_S)
            with pytest.raises(openai.RateLimitError) as raised:
                start(client, chats(PIE))
            assert raised.value.response.headers["retry-after"] == "60"
            assert start(server.openai(BOB), chats(PIE)).status == "validating_files"
        for job in jobs:
            wait(client, job.id)
        assert wait(client, start(client, chats(PIE)).id).status == "succeeded"


def test_the_turn_is_of_who_has_the_fewest_in_training() -> None:
    def job(number: int, tenant: str, status: str = "queued") -> Any:
        return SimpleNamespace(number=number, tenant=tenant, status=status)

    under_way = [job(1, "alice", "running"), job(2, "bob", "validating_files")]
    waiting = [job(3, "alice"), job(4, "bob"), job(5, "carol"), job(6, "bob")]
    order = []
    while waiting:
        under_way.append(whose_turn(waiting, under_way))
        waiting.remove(under_way[-1])
        order.append(under_way[-1].number)
    assert order == [4, 5, 3, 6]
    assert whose_turn([job(1, "bob"), job(2, "alice", "running")], under_way).number == 2


def test_a_server_that_is_started_again_goes_on_where_the_state_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    learnt = course._Texts.learn

    def learn(self: Any, step: int) -> Any:
        steps.append(step)
        return learnt(self, step)

    with serving(tmp_path) as server:
        client = server.openai()
        done = wait(client, start(client, chats(PIE, 2)).id)
        paused = start(client, chats(PIE))
        client.fine_tuning.jobs.pause(paused.id)
        until(lambda: server.engine.training.tenants == ())
        with held(monkeypatch, 5) as here:
            waiting = start(client, chats(PIE))
            assert here.wait(HANG_S)
            server.engine.stop()
    monkeypatch.setattr(course._Texts, "learn", learn)
    with serving(tmp_path) as server:
        client = server.openai()
        assert answer(client, done.fine_tuned_model)
        job = wait(client, waiting.id)
        assert (job.status, steps[0]) == ("succeeded", 4)
        assert [step for step, _ in losses(client, job.id)] == list(range(1, 13))
        assert client.fine_tuning.jobs.retrieve(paused.id).status == "paused"
        until(lambda: not (tmp_path / "jobs" / waiting.id).exists())
        client.fine_tuning.jobs.resume(paused.id)
        assert wait(client, paused.id).status == "succeeded"


def test_what_no_job_came_to_the_end_of_is_removed_at_the_start(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = wait(server.openai(), start(server.openai(), chats(PIE, 2)).id)
    folders = tmp_path / "jobs", tmp_path / "models" / "fine-tuning"
    for folder in folders:
        (folder / "ftjob-gone").mkdir()
        (folder / "ftjob-gone-ckpt-4").mkdir()
    with serving(tmp_path) as server:
        until(lambda: not any(folder.joinpath("ftjob-gone").exists() for folder in folders))
        assert answer(server.openai(), done.fine_tuned_model)


# Kills, each at a point where an effect has been written down and what tells of it may not have been.


@contextmanager
def killing(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, is_here: Callable[..., bool]
) -> Iterator[threading.Event]:
    """Calls of a method that are the ones meant end the job as a kill does: nothing more is written down; set when one has."""
    method, dead = getattr(place, name), threading.Event()

    def replaced(self: Any, *arguments: Any, **more: Any) -> Any:
        if is_here(*arguments):
            dead.set()
            raise ShuttingDown("killed")
        return method(self, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, replaced)
        yield dead


def moves_to(status: str) -> Callable[..., bool]:
    return lambda _, since, to, *__: to == status


def test_a_kill_while_a_job_ends_leaves_one_file_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killing(monkeypatch, Jobs, "move", moves_to("succeeded")) as dead, serving(tmp_path) as server:
        client = server.openai()
        job = start(client, chats(PIE))
        assert dead.wait(HANG_S)
    with serving(tmp_path) as server:
        client = server.openai()
        job = wait(client, job.id)
        assert job.status == "succeeded"
        assert [file.id for file in client.files.list(purpose="fine-tune-results")] == job.result_files
        assert answer(client, job.fine_tuned_model)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_checkpoint_that_is_made_again_after_a_kill_is_the_one_that_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deleted: bool
) -> None:
    with killing(monkeypatch, course._Texts, "keep_state", lambda *_: True) as dead, serving(tmp_path) as server:
        client = server.openai()
        job = start(client, chats(PIE))
        assert dead.wait(HANG_S)
        (told,) = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert answer(client, told.fine_tuned_model_checkpoint)
        if is_deleted:
            client.models.delete(told.fine_tuned_model_checkpoint)
    with serving(tmp_path) as server:
        client = server.openai()
        assert wait(client, job.id).status == "succeeded"
        found = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        assert [each.step_number for each in found if each == told] == ([] if is_deleted else [2])
        assert [each.step_number for each in found] == [12, 10, 8, 6, 4, *([] if is_deleted else [2])]
        assert is_deleted != (told.fine_tuned_model_checkpoint in [each.id for each in client.models.list()])
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert messages.count("Checkpoint created at step 2") == 1


@pytest.mark.parametrize(
    ("content", "to", "said"),
    [(chats("Very " * 600, 1), "queued", "are cut"), (chats(PIE) + b"{\n", "failed", "line 9:")],
    ids=["rows that are cut", "lines that are wrong"],
)
def test_what_is_said_of_files_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, to: str, said: str
) -> None:
    with killing(monkeypatch, Jobs, "move", moves_to(to)) as dead, serving(tmp_path) as server:
        job = start(server.openai(), content)
        assert dead.wait(HANG_S)
    with serving(tmp_path) as server:
        client = server.openai()
        wait(client, job.id)
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert sum(said in message for message in messages if not message.startswith("The job failed")) == 1
