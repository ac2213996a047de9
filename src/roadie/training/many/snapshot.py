"""A checkpoint of a whole run: one safetensors file, written under another name, fsynced and renamed.

    tensors     "JOB/STACK/parameters", "/exp_avg", "/exp_avg_sq" and "/best" [L, 2, n], where a job has a best evaluation
    metadata    "state": JSON: the step of the run, where each job stands, in their order, and why which job failed

No state of a random generator is kept, because there is none: a job's order follows from its seed and its step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roadie.bank.families import Family, Stack
from roadie.bank.trainable import TrainableBank
from roadie.checkpoint.replacement import sync_folder
from roadie.engine import TenantState
from roadie.errors import AdapterError, CheckpointError
from roadie.training.many.saved import SNAPSHOT_NAME
from roadie.training.many.state import ActiveJob, PreparedJob, Progress


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a checkpoint holds. failed: reason by job; tensors by name."""

    step: int
    progress: dict[str, dict[str, Any]]
    failed: dict[str, str]
    tensors: dict[str, Tensor]


def write_snapshot(
    folder: Path, step: int, bank: TrainableBank, active: Mapping[str, ActiveJob], failed: Mapping[str, str]
) -> None:
    """Replace the checkpoint in `folder`, as a whole or not at all."""
    state = {
        "step": step,
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
    found = {}
    for name, job in active.items():
        for index, stack in enumerate(bank.family_of(name).state(name)):
            of_stack = stack if job.best_row is None else {**stack, "best": job.best_row[index]}
            found.update({f"{name}/{index}/{key}": tensor.cpu() for key, tensor in of_stack.items()})
    return found


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


def restored(snapshot: Snapshot, prepared: Mapping[str, PreparedJob]) -> dict[str, tuple[ActiveJob, TenantState]]:
    """The jobs that were active, in their order, and what they have learnt.

    Jobs that are not among `prepared` (finished since, or failed) are left out. Raises `AdapterError` where the tensors are
    not those of this model.
    """
    return {name: _restored(snapshot, prepared[name]) for name in snapshot.progress if name in prepared}


def _restored(snapshot: Snapshot, prepared: PreparedJob) -> tuple[ActiveJob, TenantState]:
    name = prepared.job.name
    family = Family(prepared.layers, torch.device("cpu"))
    stacks = [_stack(snapshot, f"{name}/{index}/", stack) for index, stack in enumerate(family.stacks)]
    best = [saved.pop("best") for saved in stacks if "best" in saved]
    progress = Progress(**snapshot.progress[name])
    state = TenantState.of(family, stacks, prepared.config, progress.step)
    return ActiveJob(prepared, progress, best or None), state


def _stack(snapshot: Snapshot, begin: str, stack: Stack) -> dict[str, Tensor]:
    saved = {key.removeprefix(begin): tensor for key, tensor in snapshot.tensors.items() if key.startswith(begin)}
    shape = stack.parameters.shape
    wanted = (*shape[:2], shape[3])
    for key, tensor in saved.items():
        if tensor.shape != wanted:
            raise AdapterError(f"got {key} {tuple(tensor.shape)}; wanted {wanted}; use the model it was saved for")
    return saved
