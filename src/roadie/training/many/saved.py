"""What an interrupted run of many jobs leaves, read from its working folder. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roadie.training.interruption import NOTHING, Saved

SNAPSHOT_NAME = "checkpoint.safetensors"
RUN_NAME = "run.json"
RECORD_NAME = "training.json"


def saved_in(work: Path) -> Saved:
    """The checkpoints in a working folder, and the jobs of the run that have finished."""
    steps = [step for file in snapshots(work) if (step := _step_of(file)) is not None]
    finished = list(_finished(work))
    parts = [f"the checkpoint after step {' and '.join(map(str, steps))} in {work}"] if steps else []
    parts += [f"{len(finished)} finished jobs ({', '.join(finished)})"] if finished else []
    return Saved(f"Kept: {'; '.join(parts)}.", can_go_on=True) if parts else NOTHING


def snapshots(work: Path) -> list[Path]:
    """The checkpoints there are: of the run, or of each process that trains jobs of its own."""
    return [file for file in (work / SNAPSHOT_NAME, *sorted(work.glob(f"process-*/{SNAPSHOT_NAME}"))) if file.exists()]


def _step_of(snapshot: Path) -> int | None:
    """The step in the header of a checkpoint (8 bytes: its length; then JSON); None where there is no such file."""
    try:
        with snapshot.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return int(json.loads(header["__metadata__"]["state"])["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(work: Path) -> Iterator[str]:
    run = _read(work / RUN_NAME)
    for job in run.get("settings", {}).get("jobs", ()):
        if _read(Path(job["output"]) / RECORD_NAME).get("run") == run["mark"]:
            yield job["name"]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
