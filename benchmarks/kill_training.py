"""Kill -9 in the middle of train-many, at random moments: what an interruption loses.

    python -m benchmarks.kill_training              20 kills, about eight minutes

Each trial starts a run of eight jobs of different lengths in a process of its own, kills it at a moment drawn evenly over
the time that training takes, looks at what is on the disk, goes on with --resume, and compares with a run that nobody
killed. The trial fails where a checkpoint or an output cannot be read, a finished job is lost or changed, a job ends
otherwise than in the whole run, or losses differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from roadie import checkpoint
from roadie.embedded import corpus
from roadie.training.many.snapshot import SNAPSHOT_NAME, read_snapshot

RUN = (sys.executable, "-m", "roadie.cli", "train-many", "jobs.yaml", "--resume", "--no-progress")
JOBS, STEPS, CHECKPOINT_STEPS = 8, 60, 2
RELATIVE = 1e-4
WAIT_S = 120.0


@dataclass(frozen=True)
class Trial:
    """moment_s: after the start of training; step: of the checkpoint that was found, None where there was none."""

    moment_s: float
    step: int | None
    finished: int
    half_written: bool
    worst: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_training", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected, seconds = _whole(root / "whole")
        print(
            f"{JOBS} jobs of {STEPS // JOBS} to {STEPS} steps, a checkpoint every {CHECKPOINT_STEPS}; {seconds:.1f} s"
        )
        draw = random.Random(options.seed)
        for number in range(options.kills):
            try:
                print(f"{number + 1:2}  {_trial(root / str(number), draw.uniform(0, seconds), expected)}", flush=True)
            except AssertionError as error:
                failures += 1
                print(f"{number + 1:2}  FAILED: {error}", flush=True)
    print(f"{options.kills - failures} of {options.kills} went on without loss")
    return int(failures > 0)


def _write_jobs(folder: Path) -> None:
    """A jobs file, which is YAML, written as JSON, which YAML contains."""
    folder.mkdir(parents=True)
    modules = sorted(corpus.standard_library().glob("[a-z]*.py"), key=lambda path: path.stat().st_size)[-JOBS:]
    jobs = [
        {"name": path.stem, "data": str(path), "steps": STEPS * (number + 1) // JOBS, "seed": number}
        for number, path in enumerate(modules)
    ]
    defaults = {"batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "output": "out/{name}"}
    content = {"checkpoint_steps": CHECKPOINT_STEPS, "defaults": defaults, "jobs": jobs}
    (folder / "jobs.yaml").write_text(json.dumps(content), encoding="utf-8")


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(RUN, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _whole(folder: Path) -> tuple[dict[str, list[float]], float]:
    """The losses of a run that nobody kills, and the seconds from its first step to its end."""
    _write_jobs(folder)
    process = _start(folder)
    _wait_for_start(folder, process)
    started = time.perf_counter()
    _, said = process.communicate()
    assert process.returncode == 0, said
    return dict(_losses(folder)), time.perf_counter() - started


def _wait_for_start(folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.perf_counter() + WAIT_S
    while not (folder / "jobs.training" / "logs").exists():
        assert process.poll() is None, "the run ended before it began"
        assert time.perf_counter() < deadline, "the run did not begin"
        time.sleep(0.005)


def _losses(folder: Path) -> Iterator[tuple[str, list[float]]]:
    for file in sorted((folder / "out").glob("*/training.json")):
        history = json.loads(file.read_text(encoding="utf-8"))["history"]
        yield file.parent.name, [line["loss"] for line in history if "loss" in line]


def _trial(folder: Path, moment_s: float, expected: dict[str, list[float]]) -> Trial:
    _write_jobs(folder)
    process = _start(folder)
    _wait_for_start(folder, process)
    time.sleep(moment_s)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    work = folder / "jobs.training"
    snapshot = read_snapshot(work)  # raises where it is damaged
    half_written = (work / f"{SNAPSHOT_NAME}.new").exists()
    outputs = _outputs(folder)
    _, said = (again := _start(folder)).communicate()
    assert again.returncode == 0, said.decode()[-500:]
    for name, content in outputs.items():
        assert _outputs(folder).get(name) == content, f"the finished job {name} was changed"
    found = dict(_losses(folder))
    assert found.keys() == expected.keys(), f"got outputs of {sorted(found)}"
    step = None if snapshot is None else snapshot.step
    return Trial(round(moment_s, 2), step, len(outputs), half_written, _worst(found, expected))


def _outputs(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of every output that is there; each must load."""
    found = {}
    for output in sorted((folder / "out").glob("[a-z]*")):
        checkpoint.load(output)
        found[output.name] = {path.name: path.read_bytes() for path in output.iterdir()}
    return found


def _worst(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The largest relative difference of any loss of any step."""
    worst = 0.0
    for name, losses in expected.items():
        assert len(found[name]) == len(losses), f"{name} has {len(found[name])} steps; wanted {len(losses)}"
        worst = max([worst, *(abs(a - b) / b for a, b in zip(found[name], losses, strict=True))])
    assert worst <= RELATIVE, f"losses differ by {worst:.1e}"
    return worst


if __name__ == "__main__":
    sys.exit(main())
