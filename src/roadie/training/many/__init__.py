"""Training many adapters at once: one base model, one forward and one backward a step, every job on its own terms.

    train_many("jobs.yaml")                                    or
    train_many([Job("french", data, "french-adapter", Recipe(max_steps=200)), ...], model="...")

`run` is the way through; names resolve on first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie.training.many.job import Job, RunSettings
    from roadie.training.many.jobs_file import Plan, read_jobs
    from roadie.training.many.observer import Observer
    from roadie.training.many.result import JobResult, JobStatus, ManyResult
    from roadie.training.many.run import train_many

__all__ = [
    "Job",
    "JobResult",
    "JobStatus",
    "ManyResult",
    "Observer",
    "Plan",
    "RunSettings",
    "read_jobs",
    "train_many",
]

_MODULES = {
    "job": ("Job", "RunSettings"),
    "jobs_file": ("Plan", "read_jobs"),
    "observer": ("Observer",),
    "result": ("JobResult", "JobStatus", "ManyResult"),
    "run": ("train_many",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
