"""The grid on real language models: `real.yaml` for each model that is there, with data in a folder, without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import models
from benchmarks.machine import ROOT
from benchmarks.quality.hub.sweep import Choice, sweep
from roadie.errors import ConfigError

GRID = ROOT / "benchmarks" / "quality" / "real.yaml"
TASKS = {
    "smollm2": ("mawps", "openbookqa", "style", "arc-easy", "boolq", "gsm8k"),
    "gemma3": ("mawps",),  # it has no chat template, and a step takes longer
}


def sweep_all(
    data: Path,
    folder: Path | None,
    records: Path,
    device: str,
    stop: Callable[[], bool],
    only: Sequence[str] = (),
) -> int:
    """Train what `records` lack, model after model; gives the number of runs. only: names of tasks.

    Raises `ConfigError` where none of the models is there.
    """
    there = {name: path for name in TASKS if (path := models.present(name, folder)) is not None}
    if not there:
        raise ConfigError(
            f"got no model in {folder or models.default_folder()}; wanted one of {', '.join(TASKS)}; "
            "python -m benchmarks.models fetches them"
        )
    count = 0
    for name, path in there.items():
        tasks = [task for task in TASKS[name] if task in (only or TASKS[name])]
        if tasks:
            choice = Choice(tasks=tasks, model=str(path), device=device, data=data)
            count += sweep(GRID, choice, records, stop)
    return count
