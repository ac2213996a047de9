"""Where each job stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from roadie.bank.families import AdaptedLayer
from roadie.engine import AdamSettings
from roadie.training.many.data import JobData
from roadie.training.many.job import Job
from roadie.training.many.result import JobResult, JobStatus
from roadie.training.many.schedule import learning_rate


@dataclass(frozen=True, eq=False)
class PreparedJob:
    """A job that can be trained: its examples, the layers it adapts, its adapter_config.json, and how many steps it takes."""

    job: Job
    data: JobData
    layers: tuple[AdaptedLayer, ...]
    config: Mapping[str, Any]
    steps: int


@dataclass
class Progress:
    """What has been done of a job: plain numbers, which a checkpoint keeps as they are."""

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_before: float | None = None
    eval_after: float | None = None
    best_loss: float | None = None
    best_step: int | None = None


@dataclass(eq=False)
class ActiveJob:
    """A job that takes part in the steps; best_row: the parameters of `Progress.best_step`, see `Family.row`."""

    prepared: PreparedJob
    progress: Progress = field(default_factory=Progress)
    best_row: list[Tensor] | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.prepared.job.name

    @property
    def is_done(self) -> bool:
        """Whether all of its steps are done."""
        return self.progress.step >= self.prepared.steps

    @property
    def is_due_for_evaluation(self) -> bool:
        """Whether it has held-out data and is at a step at which they are looked at."""
        interval = self.prepared.job.eval_steps
        at_interval = interval is not None and self.progress.step % interval == 0
        return bool(self.prepared.data.held_out) and (at_interval or self.is_done or self.progress.step == 0)

    def settings(self) -> AdamSettings:
        """What the optimiser is told for the next step."""
        recipe, done = self.prepared.job.recipe, self.progress.step
        rate = learning_rate(recipe, done, self.prepared.steps)
        return AdamSettings(rate, recipe.weight_decay, recipe.max_grad_norm)

    def stepped(self, loss: float, tokens: int) -> None:
        """Note a step that was done."""
        progress = self.progress
        progress.first_loss = loss if progress.step == 0 else progress.first_loss
        progress.last_loss = loss
        progress.tokens += tokens
        progress.step += 1

    def evaluated(self, loss: float) -> bool:
        """Note a held-out loss; whether it is the best so far of a trained adapter."""
        progress = self.progress
        if progress.step == 0:
            progress.eval_before = loss
            return False
        progress.eval_after = loss
        is_best = progress.best_loss is None or loss < progress.best_loss
        if is_best:
            progress.best_loss, progress.best_step = loss, progress.step
        return is_best

    def result(self, status: JobStatus, reason: str | None = None) -> JobResult:
        """What became of it."""
        progress = self.progress
        return JobResult(
            name=self.name,
            output=Path(self.prepared.job.output),
            status=status,
            reason=reason,
            steps=progress.step,
            first_loss=progress.first_loss,
            last_loss=progress.last_loss,
            eval_before=progress.eval_before,
            eval_after=progress.best_loss if progress.best_loss is not None else progress.eval_after,
            best_step=progress.best_step,
            tokens=progress.tokens,
            learning_rate=self.prepared.job.recipe.learning_rate,
        )
