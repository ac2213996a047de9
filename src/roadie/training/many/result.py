"""What became of the jobs of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class JobStatus(str, Enum):
    """finished: its adapter is on disk; before: it was so already when the run was resumed; failed: `reason` says why."""

    FINISHED = "finished"
    BEFORE = "finished before"
    FAILED = "failed"


@dataclass(frozen=True)
class JobResult:
    """What became of one job. Losses are nats a token.

    steps: steps that were done; first_loss, last_loss: of its first and last training batch; eval_before, eval_after: on
    held-out data, None where there are none; best_step: the step whose adapter was kept, None for the last one;
    tokens: learnt from, without padding; learning_rate: at its peak, None where the job never began.
    """

    name: str
    output: Path
    status: JobStatus
    reason: str | None = None
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_before: float | None = None
    eval_after: float | None = None
    best_step: int | None = None
    tokens: int = 0
    learning_rate: float | None = None


@dataclass(frozen=True)
class ManyResult:
    """What a run did. work: the folder with the logs; seconds, steps: of this session."""

    jobs: tuple[JobResult, ...]
    work: Path
    steps: int
    seconds: float

    @property
    def failed(self) -> tuple[JobResult, ...]:
        """The jobs that did not finish."""
        return tuple(job for job in self.jobs if job.status is JobStatus.FAILED)

    def __getitem__(self, name: str) -> JobResult:
        """The result of the job `name`; raises KeyError where there is none."""
        for job in self.jobs:
            if job.name == name:
                return job
        raise KeyError(name)
