"""Many jobs on two processes, spread by jobs and by rows; and a process that dies."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from tests.once import once

from roadie import checkpoint
from roadie.distributed.processes import Processes
from roadie.errors import ConfigError
from roadie.testing.accuracy import relative_error, unit_roundoff
from roadie.training.checkpoints import last_complete
from roadie.training.many import read_jobs, train_many
from roadie.training.many.sharing import Sharing
from roadie.training.many.snapshot import read_snapshot

FOLDER = Path(__file__).parent
TINY = runpy.run_path(str(FOLDER.parent / "training" / "tiny.py"))
SHARED = runpy.run_path(str(FOLDER.parent / "training" / "many" / "conftest.py"))
SETTINGS_OF, OF_LOSSES = SHARED["settings_of"], SHARED["OF_LOSSES"]
PROGRAM = FOLDER / "program_train_many.py"
NAMES = [f"job{number}" for number in range(5)]

# A gradient is a sum over fewer than 2^9 tokens, of products that end chains of inner products, together of fewer than 2^12
# terms (14 layers of at most 128 inputs there and back). In float32, another order changes it by at most that many roundoffs.
OF_A_GRADIENT = (2**9 + 2**12) * unit_roundoff(torch.float32)


def write_jobs(folder: Path, base: Path) -> Path:
    """A jobs file of five jobs of three variants, one of which evaluates."""
    (folder / "out").mkdir(parents=True)
    jobs = [SETTINGS_OF(folder, number) for number in range(5)]
    jobs[2] |= {"eval_share": 0.3, "eval_steps": 3}
    (folder / "jobs.yaml").write_text(yaml.safe_dump({"model": str(base), "jobs": jobs}))
    return folder / "jobs.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, launch) -> Path:
    """A folder with the outputs of one process (one), of two (jobs, rows), and of two of which one dies (dies, dead)."""
    return once(tmp_path_factory, "many", lambda folder: fill(folder, launch))


def fill(folder: Path, launch) -> None:
    base = TINY["build"](folder / "base")
    for name in ("one", "jobs", "rows", "dies"):
        write_jobs(folder / name, base)
    own = runpy.run_path(str(PROGRAM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own["optimiser"], "squared_norms", own["optimiser"].squared_norms)
        own["recorded_gradients"](folder / "gradients-one.pt")
        train_many(folder / "one" / "jobs.yaml", settings=own["SETTINGS"])
    launch(PROGRAM, "spread", base, folder, fails=True)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    (folder / "left.json").write_text(json.dumps(sorted(left)))
    snapshot = read_snapshot(folder / "dies" / "out" / "train-many.training" / "process-1")
    assert snapshot is not None
    assert snapshot.step == 4
    launch(PROGRAM, "resume", base, folder, fails=True)


def history(output: Path, key: str) -> list[float]:
    lines = json.loads((output / "training.json").read_text())["history"]
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", ["jobs", "rows", "dies"])
def test_a_job_is_what_it_is_in_one_process(run: str, name: str, runs: Path) -> None:
    wanted, found = runs / "one" / "out" / name, runs / run / "out" / name
    assert len(history(wanted, "loss")) == 8
    for key in ("loss", "eval_loss", "learning_rate"):
        assert history(found, key) == pytest.approx(history(wanted, key), rel=OF_LOSSES), key
    adapters = [checkpoint.load(folder) for folder in (found, wanted)]
    assert adapters[0].layers.keys() == adapters[1].layers.keys()
    results = [json.loads((folder / "training.json").read_text())["result"] for folder in (found, wanted)]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["best_step"] == results[1]["best_step"]


def test_the_gradients_of_rows_are_summed(runs: Path) -> None:
    wanted = torch.load(runs / "gradients-one.pt")
    for rank in range(2):
        found = torch.load(runs / f"gradients-{rank}.pt")
        assert len(found) == len(wanted) > 5
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative_error(ours, theirs.double()) <= OF_A_GRADIENT
    for first, second in zip(*(torch.load(runs / f"gradients-{rank}.pt") for rank in range(2)), strict=True):
        assert torch.equal(first, second)


def test_a_process_that_dies_leaves_nothing_half_written(runs: Path) -> None:
    left = json.loads((runs / "left.json").read_text())
    outputs = {name.split("/")[2] for name in left if name.startswith("dies/out/")}
    assert {"train-many.training"} <= outputs <= {"train-many.training", "job0", "job2", "job4"}
    assert not (runs / "dead").exists()
    assert last_complete(runs / "dead.training").name == "checkpoint-4"
    assert not list(runs.glob(".dead-*"))


def test_the_working_folder_at_the_end(runs: Path) -> None:
    work = next(runs.glob("dies/out/*.training"))
    assert {path.name for path in work.iterdir()} >= {"run.json", "logs"}
    assert not list(work.rglob("checkpoint.safetensors*")) + list(work.glob("process-*"))
    outcome = json.loads((work / "run.json").read_text())["outcome"]
    assert sorted(outcome) == NAMES
    assert {one["status"] for one in outcome.values()} <= {"finished", "finished before"}
    assert outcome["job1"]["status"] == outcome["job3"]["status"] == "finished"
    for name in NAMES:
        steps = [json.loads(line) for line in (work / "logs" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == list(range(1, 9))


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    plan = read_jobs(write_jobs(tmp_path / "jobs", tmp_path))
    with pytest.raises(ConfigError, match=r"got spread='columns'; wanted one of jobs, rows"):
        Sharing.of(Processes(), "columns", plan)
    with pytest.raises(ConfigError, match=r"got 6 processes for 5 job\(s\).*spread rows"):
        Sharing.of(Processes(0, 6), "jobs", plan)
    assert Sharing.of(Processes(0, 6), "rows", plan).own(plan) is plan
    parts = [Sharing.of(Processes(rank, 2), "jobs", plan).own(plan) for rank in range(2)]
    assert [[job.name for job in part.jobs] for part in parts] == [NAMES[::2], NAMES[1::2]]
