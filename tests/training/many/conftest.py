"""Small jobs on the tiny model of tests/training."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

OF_LOSSES = runpy.run_path(str(Path(__file__).parents[1] / "tiny.py"))["of_losses"](3 * 96)
"""How far apart losses of a job may be, relative to their size: a batch has at most 3 rows of 96 tokens."""

KINDS = (
    {"variant": "road_1", "targets": "all-linear"},
    {"variant": "road_2", "targets": ["q_proj", "v_proj"], "schedule": "cosine"},
    {"variant": "road_4", "targets": "all-linear", "weight_decay": 0.1},
    {"variant": "road_1", "group_size": 8, "targets": ["down_proj"], "schedule": "constant", "max_grad_norm": 0.05},
    {"variant": "road_1", "targets": "all-linear", "batch_size": 3, "warmup_ratio": 0.5, "max_grad_norm": 0.0},
)


def write_texts(path: Path, number: int, count: int = 11) -> Path:
    """Records that differ from those of another number, of several lengths."""
    lines = [{"prompt": f"{k:02d} is ", "completion": f"{number} kinds of turtles" * (1 + k % 3)} for k in range(count)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def settings_of(folder: Path, number: int, **changes: object) -> dict[str, object]:
    """A job in the words of a jobs file, its kind one of `KINDS` in turn."""
    name = f"job{number}"
    return {
        "name": name,
        "data": str(write_texts(folder / f"{name}.jsonl", number)),
        "output": str(folder / "out" / name),
        "learning_rate": 0.01 * (1 + number % 4),
        "steps": 8,
        "batch_size": 2,
        "group_size": 16,
        "max_length": 96,
        "seed": number,
        **KINDS[number % len(KINDS)],
        **changes,
    }


@pytest.fixture
def some_jobs(tmp_path):
    """Call it with a count and changes: jobs in the words of a jobs file, in the folder of the test."""

    def make(count: int, folder: Path = tmp_path, **changes: object) -> list[dict[str, object]]:
        folder.mkdir(exist_ok=True)
        return [settings_of(folder, number, **changes) for number in range(count)]

    return make


def losses(result, name: str) -> list[float]:
    """The training losses of a finished job, by its training.json."""
    history = json.loads((Path(result[name].output) / "training.json").read_text())["history"]
    return [line["loss"] for line in history if "loss" in line]
