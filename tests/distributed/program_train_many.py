"""Run by torchrun: many jobs, spread both ways; and a process that dies. Arguments: what, base, folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from roadie.distributed import Processes, joined
from roadie.engine import optimiser
from roadie.training.many import Observer, RunSettings, read_jobs, train_many
from roadie.training.recipe import Recipe
from roadie.training.run import train

SETTINGS = RunSettings(checkpoint_steps=2, max_tokens_per_step=400)


class Dies(Observer, TrainerCallback):
    """The second process ends at its fifth step, as if it were killed."""

    def __init__(self, together: Processes) -> None:
        self.left = 5 if together.rank == 1 else None

    def on_step(self, reports, seconds):
        self._count()

    def on_step_end(self, args, state, control, **_):
        self._count()

    def _count(self) -> None:
        self.left = None if self.left is None else self.left - 1
        if self.left == 0:
            os._exit(7)


def recorded_gradients(path: Path) -> None:
    """From now on the gradients of the first step are written to a file."""
    look, found = optimiser.squared_norms, {}

    def recording(family, rows):
        of_jobs = {family.names[row]: [stack.gradients[:, :, row].clone() for stack in family.stacks] for row in rows}
        if not found.keys() >= of_jobs.keys():
            found.update({name: gradients for name, gradients in of_jobs.items() if name not in found})
            torch.save([gradient for name in sorted(found) for gradient in found[name]], path)
        return look(family, rows)

    optimiser.squared_norms = recording


def jobs_in(folder: Path):
    return read_jobs(folder / "jobs.yaml")


def main(what: str, base: str, folder: Path) -> None:
    with joined() as together:
        os.chdir(folder)
        if what == "spread":
            train_many(jobs_in(folder / "jobs"), model=base, settings=SETTINGS, spread="jobs")
            recorded_gradients(folder / f"gradients-{together.rank}.pt")
            train_many(jobs_in(folder / "rows"), model=base, settings=SETTINGS, spread="rows")
            train_many(jobs_in(folder / "dies"), model=base, settings=SETTINGS, observers=[Dies(together)])
        if what == "resume":
            train_many(jobs_in(folder / "dies"), model=base, settings=SETTINGS, resume=True)
            recipe = Recipe(max_steps=8, batch_size=8, group_size=16, checkpoint_steps=2)
            data = folder / "rows" / "job0.jsonl"
            train(data, folder / "dead", model=base, recipe=recipe, callbacks=[Dies(together)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
