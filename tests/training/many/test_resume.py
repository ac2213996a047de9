"""An interruption changes nothing: not by an exception, and not by kill -9."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from tests.patience import until

from roadie.errors import CheckpointError, ConfigError
from roadie.training.folders import OutputExists
from roadie.training.many import JobStatus, Observer, RunSettings, train_many
from roadie.training.many.snapshot import SNAPSHOT_NAME, read_snapshot
from roadie.training.many.state import ActiveJob

SHARED = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
losses, OF_LOSSES = SHARED["losses"], SHARED["OF_LOSSES"]
OFTEN = RunSettings(checkpoint_steps=3)


class Stop(Observer):
    """Raises after some steps of the run."""

    def __init__(self, step):
        self.left = step

    def on_step(self, reports, seconds):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def weights(folder) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(some_jobs, tiny_path, tmp_path):
    whole = train_many(some_jobs(5, tmp_path / "whole"), model=str(tiny_path), settings=OFTEN)
    jobs = some_jobs(5, tmp_path / "cut", eval_share=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    assert read_snapshot(tmp_path / "cut" / "out" / "train-many.training").step == 3
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    assert resumed.steps == 5
    for job in whole.jobs:
        assert losses(resumed, job.name) == losses(whole, job.name)
        assert weights(resumed[job.name].output) == weights(job.output)
    assert not (resumed.work / SNAPSHOT_NAME).exists()


def test_the_best_adapter_survives_an_interruption(some_jobs, tiny_path, tmp_path, monkeypatch):
    """The held-out losses are made to be best at step 2, before the checkpoint of step 6 that the run goes on from."""
    evaluated = ActiveJob.evaluated
    monkeypatch.setattr(ActiveJob, "evaluated", lambda job, _: evaluated(job, float(abs(job.progress.step - 2))))
    changes = {"eval_share": 0.3, "eval_steps": 1}
    whole = train_many(some_jobs(2, tmp_path / "whole", **changes), model=str(tiny_path), settings=OFTEN)
    jobs = some_jobs(2, tmp_path / "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(7)])
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    for job in whole.jobs:
        assert resumed[job.name].best_step == job.best_step == 2
        assert weights(resumed[job.name].output) == weights(job.output)
    unlike = train_many(some_jobs(2, tmp_path / "last"), model=str(tiny_path))
    assert weights(unlike["job0"].output) != weights(whole["job0"].output)


def test_finished_jobs_are_final_and_skipped(some_jobs, tiny_path, tmp_path):
    jobs = some_jobs(3, batch_size=2)
    jobs[1]["steps"] = 4
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    output = Path(jobs[1]["output"])
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert before
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    assert resumed["job1"].status is JobStatus.BEFORE
    assert resumed["job1"].last_loss == losses(resumed, "job1")[-1]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before
    again = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    assert [job.status for job in again.jobs] == [JobStatus.BEFORE] * 3
    assert again.steps == 0
    with pytest.raises(OutputExists):
        train_many(jobs, model=str(tiny_path), settings=OFTEN)


def test_a_run_is_resumed_only_as_it_was(some_jobs, tiny_path):
    jobs = some_jobs(2)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    with pytest.raises(OutputExists, match="did not finish"):
        train_many(jobs, model=str(tiny_path), settings=OFTEN)
    with pytest.raises(ConfigError, match=r"other settings.*\(job job1\)"):
        train_many([jobs[0], {**jobs[1], "learning_rate": 0.9}], model=str(tiny_path), settings=OFTEN, resume=True)
    with pytest.raises(ConfigError, match="checkpoint_steps"):
        train_many(jobs, model=str(tiny_path), settings=RunSettings(checkpoint_steps=4), resume=True)
    with pytest.raises(ConfigError, match="overwrite and resume"):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True, overwrite=True)
    assert train_many(jobs, model=str(tiny_path), settings=OFTEN, overwrite=True).steps == 8


def test_few_rows_that_are_seen_often_are_trained_at_a_lower_rate(some_jobs, tiny_path):
    jobs = [{**job, "steps": 40, "batch_size": 2} for job in some_jobs(2)]
    del jobs[1]["learning_rate"]
    result = train_many(jobs, model=str(tiny_path), settings=OFTEN)
    assert result["job0"].learning_rate == jobs[0]["learning_rate"]
    assert result["job1"].learning_rate == 8.5e-3  # sqrt(20 / 40) of what the width gives


def test_a_rate_by_the_models_width_is_recorded_and_kept_by_a_resumed_run(some_jobs, tiny_path, monkeypatch):
    jobs = some_jobs(2)
    del jobs[1]["learning_rate"]
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    monkeypatch.setattr("roadie.training.recipe.default_learning_rate", lambda *of: 0.7)  # as another version may
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    assert [job.learning_rate for job in resumed.jobs] == [jobs[0]["learning_rate"], 1.2e-2]
    record = json.loads((Path(jobs[1]["output"]) / "training.json").read_text())
    assert record["settings"]["learning_rate"] == record["result"]["learning_rate"] == 1.2e-2
    assert max(line["learning_rate"] for line in record["history"] if "loss" in line) == 1.2e-2
    again = train_many(jobs, model=str(tiny_path), settings=OFTEN, overwrite=True)
    assert again["job1"].learning_rate == 0.7


def test_data_that_are_mended_join_the_resumed_run(some_jobs, tiny_path):
    jobs = some_jobs(2)
    good = Path(jobs[1]["data"]).read_text()
    Path(jobs[1]["data"]).write_text("{")
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    Path(jobs[1]["data"]).write_text(good)
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    assert [job.status for job in resumed.jobs] == [JobStatus.FINISHED] * 2
    assert len(losses(resumed, "job1")) == 8


def test_a_damaged_checkpoint_is_named(some_jobs, tiny_path):
    jobs = some_jobs(1)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    file = Path(jobs[0]["output"]).parent / "train-many.training" / SNAPSHOT_NAME
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)


RUN = "import sys; from roadie.training.many import train_many; train_many(sys.argv[1], resume=True)"


@pytest.mark.parametrize("lines", [2, pytest.param(9, marks=pytest.mark.long)])
def test_kill_9_loses_no_job_and_corrupts_no_checkpoint(lines, some_jobs, tiny_path, tmp_path):
    """Killed when job0 has logged so many steps; twice, since a resumed run can be killed as well."""
    content = {"model": str(tiny_path), "checkpoint_steps": 2, "jobs": some_jobs(3, steps=60)}
    content["jobs"][1]["steps"] = 3
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump(content))
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(file)], stderr=subprocess.DEVNULL)
        wait_for_log(tmp_path / "jobs.training" / "logs" / "job0.jsonl", lines, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        snapshot = read_snapshot(tmp_path / "jobs.training")
        assert snapshot is None or snapshot.step % 2 == 0
    resumed = train_many(file, resume=True)
    assert not resumed.failed
    whole = train_many(some_jobs(1, tmp_path / "whole", steps=60), model=str(tiny_path))
    pairs = list(zip(losses(resumed, "job0"), losses(whole, "job0"), strict=True))
    assert max(abs(a - b) / b for a, b in pairs) <= OF_LOSSES
    assert len(losses(resumed, "job1")) == 3


def wait_for_log(file: Path, lines: int, process) -> None:
    until(lambda: process.poll() is not None or (file.exists() and len(file.read_text().splitlines()) >= lines))


def test_logs_hold_each_step_once(some_jobs, tiny_path):
    jobs = some_jobs(2)
    with pytest.raises(KeyboardInterrupt):
        train_many(jobs, model=str(tiny_path), settings=OFTEN, observers=[Stop(5)])
    resumed = train_many(jobs, model=str(tiny_path), settings=OFTEN, resume=True)
    lines = [json.loads(line) for line in (resumed.work / "logs" / "job0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert lines[-1] == {"step": 8, "finished": jobs[0]["output"]}


def test_tensorboard_is_told_where_it_is_installed(some_jobs, tiny_path, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder):
            told.append(folder)

        def add_scalar(self, *arguments):
            told.append(arguments)

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    result = train_many(some_jobs(1), model=str(tiny_path))
    assert (told[0], told[-1]) == (str(result.work / "tensorboard"), "closed")
    scalars = [entry for entry in told[1:-1] if entry[0] == "loss/job0"]
    assert [step for _, _, step in scalars] == list(range(1, 9))
    assert [loss for _, loss, _ in scalars] == losses(result, "job0")
