"""What a run tells whoever wants to know: one method an event, all of which do nothing unless overridden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roadie.training.many.job import Job
from roadie.training.many.result import JobResult


@dataclass(frozen=True)
class StepReport:
    """What one step of one job did. step: its own, from 1; loss: nats a token, before the step; seconds: of all jobs' step."""

    name: str
    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


class Observer:
    """Base class of what is told about a run; an interface whose methods do nothing."""

    def on_start(self, jobs: Sequence[Job], steps: Mapping[str, int]) -> None:
        """The run begins (or goes on); steps: by job, without those that failed before the start."""

    def on_join(self, name: str, step: int) -> None:
        """A job takes part from its own step number `step` on."""

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """One step of all active jobs is done, in so many seconds."""

    def on_evaluation(self, name: str, step: int, loss: float) -> None:
        """The held-out loss of a job after `step` of its steps."""

    def on_end(self, result: JobResult) -> None:
        """A job has finished or failed; its output is on disk where it has finished."""

    def on_checkpoint(self, step: int) -> None:
        """The run can be resumed from here; step: of the run."""
