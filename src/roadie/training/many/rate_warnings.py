"""A warning for each job whose loss says that its learning rate is far off (`roadie.training.rate_watch`), once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from roadie.training.many.job import Job
from roadie.training.many.observer import Observer, StepReport
from roadie.training.rate_watch import LossWatch

logger = logging.getLogger("roadie")


class RateWarnings(Observer):
    """Listens to a run; history: the losses of a job so far, as `Logs.history` gives them."""

    def __init__(self, history: Callable[[str], Sequence[Mapping[str, float]]]) -> None:
        self._history = history
        self._watches: dict[str, LossWatch] = {}

    def on_start(self, jobs: Sequence[Job], steps: Mapping[str, int]) -> None:
        """Jobs that failed before the start are not watched."""
        peaks = {job.name: job.recipe.peak_rate for job in jobs}
        self._watches = {name: LossWatch(count, peaks[name]) for name, count in steps.items()}

    def on_join(self, name: str, step: int) -> None:
        """What a former session of the run said is not said again."""
        for line in self._history(name) if step else ():
            if "loss" in line:
                self._watches[name].see(int(line["step"]), line["loss"], line["learning_rate"])

    def on_step(self, reports: Sequence[StepReport], seconds: float) -> None:
        """One more loss of each job."""
        for report in reports:
            said = self._watches[report.name].see(report.step, report.loss, report.learning_rate)
            if said is not None:
                logger.warning("job %s: %s", report.name, said)
