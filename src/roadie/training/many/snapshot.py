"""A checkpoint of a whole run: one safetensors file, written under another name, fsynced and renamed.

    tensors     "FAMILY.STACK.parameters", ".exp_avg", ".exp_avg_sq" [L, 2, S, n]; "best.JOB.STACK" [L, 2, n]
    metadata    "state": JSON: the step of the run, the jobs of each family in the order of their rows, where each job
                stands, and why which job failed

No state of a random generator is kept, because there is none: a job's order follows from its seed and its step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roadie.bank.trainable import TrainableBank
from roadie.checkpoint.replacement import sync_folder
from roadie.errors import CheckpointError
from roadie.training.many.saved import SNAPSHOT_NAME
from roadie.training.many.state import ActiveJob, PreparedJob, Progress


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a checkpoint holds. failed: reason by job; families: the names of their jobs; tensors by name."""

    step: int
    families: list[list[str]]
    progress: dict[str, dict[str, Any]]
    failed: dict[str, str]
    tensors: dict[str, Tensor]


def write_snapshot(
    folder: Path, step: int, bank: TrainableBank, active: Mapping[str, ActiveJob], failed: Mapping[str, str]
) -> None:
    """Replace the checkpoint in `folder`, as a whole or not at all."""
    state = {
        "step": step,
        "families": [family.names for family in bank.families],
        "progress": {name: asdict(job.progress) for name, job in active.items()},
        "failed": dict(failed),
    }
    temporary = folder / f"{SNAPSHOT_NAME}.new"
    save_file(_tensors(bank, active), temporary, metadata={"state": json.dumps(state)})
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(folder / SNAPSHOT_NAME)
    sync_folder(folder)


def _tensors(bank: TrainableBank, active: Mapping[str, ActiveJob]) -> dict[str, Tensor]:
    stacked = {
        f"{number}.{index}.{name}": tensor
        for number, family in enumerate(bank.families)
        for index, stack in enumerate(family.stacks)
        for name, tensor in stack.tensors.items()
    }
    best = {
        f"best.{name}.{index}": tensor
        for name, job in active.items()
        for index, tensor in enumerate(job.best_row or [])
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in {**stacked, **best}.items()}


def read_snapshot(folder: Path) -> Snapshot | None:
    """The checkpoint in `folder`, None where there is none; raises `CheckpointError` where it is damaged."""
    file = folder / SNAPSHOT_NAME
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            state = json.loads(stream.metadata()["state"])
            tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118 (not a mapping)
        return Snapshot(tensors=tensors, **state)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: got a damaged checkpoint ({error}); wanted a whole one; start anew") from error


def restore(snapshot: Snapshot, bank: TrainableBank, prepared: Mapping[str, PreparedJob]) -> dict[str, ActiveJob]:
    """Fill an empty bank; the jobs that were active, in the order of their slots.

    Jobs that are not among `prepared` (finished since, or failed) are left out. Raises `AdapterError` where the tensors are
    not those of this model.
    """
    for number, names in enumerate(snapshot.families):
        known = [name for name in names if name in prepared]
        if known:
            bank.load(names, prepared[known[0]].layers, _stacks_of(snapshot, number))
    bank.keep_only(list(prepared))
    return {name: _active(snapshot, prepared[name]) for name in bank.names}


def _stacks_of(snapshot: Snapshot, family: int) -> list[dict[str, Tensor]]:
    stacks: dict[int, dict[str, Tensor]] = {}
    for key, tensor in snapshot.tensors.items():
        number, index, name = key.split(".", 2) if not key.startswith("best.") else ("", "", "")
        if number == str(family):
            stacks.setdefault(int(index), {})[name] = tensor
    return [stacks[index] for index in sorted(stacks)]


def _active(snapshot: Snapshot, prepared: PreparedJob) -> ActiveJob:
    name = prepared.job.name
    best = {key: tensor for key, tensor in snapshot.tensors.items() if key.rpartition(".")[0] == f"best.{name}"}
    rows = [best[f"best.{name}.{index}"] for index in range(len(best))] or None
    return ActiveJob(prepared, Progress(**snapshot.progress[name]), rows)
