"""The steps of a run: who takes part, one forward and backward for all, and what each job does with its gradient.

    while jobs are left:  join -> step -> evaluate -> leave (finished or failed) -> checkpoint

Each job is a tenant of one `TrainingEngine`, and its loss the mean over its own learnt tokens. A job whose loss or gradient is
not finite leaves; the others are what they would be if it had finished at that step.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from roadie.bank.trainable import TrainableBank
from roadie.distributed.processes import Processes
from roadie.engine import AdamSettings, ForwardResult, StepResult, TrainingEngine, TrainingRow, TrainingSettings
from roadie.errors import NotFinite
from roadie.training.encoding import IGNORED, Example
from roadie.training.interruption import stop_request
from roadie.training.many.job import RunSettings
from roadie.training.many.observer import Observer, StepReport
from roadie.training.many.result import JobResult, JobStatus
from roadie.training.many.snapshot import Snapshot, restored
from roadie.training.many.state import ActiveJob, PreparedJob

logger = logging.getLogger("roadie")

Finish = Callable[[ActiveJob, TrainableBank], JobResult]
Save = Callable[["Session"], None]
_UNLIMITED = 1 << 62


class Session:
    """Jobs in training on one model. finish: writes the output of a job that is done; save: writes a checkpoint.

    together: processes that each hold all of the jobs and share the rows of every step.
    """

    def __init__(
        self,
        model: Any,
        prepared: Sequence[PreparedJob],
        settings: RunSettings,
        observers: Sequence[Observer],
        finish: Finish,
        save: Save,
        together: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self.active: dict[str, ActiveJob] = {}
        self.failed: dict[str, str] = {}
        self.results: dict[str, JobResult] = {}
        self.step = 0
        self._waiting = deque(prepared)
        self._settings = settings
        self._observers = observers
        self._finish = finish
        self._save = save
        self._together = together
        sizes = TrainingSettings(
            settings.max_tokens_per_step,
            keep=settings.keep,
            max_tenants=_UNLIMITED,
            max_calls_per_tenant=_UNLIMITED,
            max_tokens_per_tenant=_UNLIMITED,
        )
        self._engine = TrainingEngine(model, sizes, sum_=together.sum_ if together.count > 1 else None)

    @property
    def bank(self) -> TrainableBank:
        """Parameters and moments of the active jobs."""
        return self._engine.bank

    def go_on(self, snapshot: Snapshot) -> None:
        """Take everything up where a checkpoint left it."""
        prepared = {one.job.name: one for one in self._waiting}
        self.step = snapshot.step
        for name, (job, state) in restored(snapshot, prepared).items():
            self.active[name] = job
            self._engine.create(name, state)
        self._engine.run()
        self._waiting = deque(one for name, one in prepared.items() if name not in self.active)

    def run(self) -> None:
        """Train every job to its end."""
        with stop_request(enabled=self._together.count == 1) as stop:
            self._join()
            while self.active:
                self._step()
                self._evaluate(job for job in self.active.values() if job.is_due_for_evaluation)
                self._leave([job for job in self.active.values() if job.is_done])
                self._join()
                is_due = stop.asked or self.step % self._settings.checkpoint_steps == 0
                if is_due and self.active:
                    self._save(self)
                    self._tell("on_checkpoint", self.step)
                if stop.asked and self.active:
                    raise KeyboardInterrupt

    def _join(self) -> None:
        """Let waiting jobs take part, as many as may."""
        room = self._settings.max_active_jobs or math.inf
        joined = []
        while self._waiting and len(self.active) < room:
            job = ActiveJob(self._waiting.popleft())
            self.active[job.name] = job
            joined.append(job)
        if not joined:
            return
        for job in joined:
            self._engine.create(job.name, job.prepared.config, layers=job.prepared.layers)
        self._engine.run()
        for job in joined:
            self._tell("on_join", job.name, 0)
        self._evaluate(job for job in joined if job.is_due_for_evaluation)

    def _step(self) -> None:
        started = time.perf_counter()
        jobs = list(self.active.values())
        rows = {job.name: job.prepared.data.rows(job.progress.step) for job in jobs}
        losses = {name: self._engine.forward_backward(name, *self._own(of_job)) for name, of_job in rows.items()}
        settings = {job.name: job.settings() for job in jobs}
        steps = {name: self._engine.optim_step(name, of_job) for name, of_job in settings.items()}
        self._engine.run()
        self.step += 1
        tokens = {name: sum(map(learnt_tokens, of_job)) for name, of_job in rows.items()}
        found = [(job, loss, norm_of(steps[job.name])) for job, loss in zip(jobs, self._all(losses), strict=True)]
        self._account(found, tokens, settings, time.perf_counter() - started)

    def _own(self, examples: Sequence[Example]) -> tuple[list[TrainingRow], str]:
        """The rows of this process: of each length about as many as the others have; their losses add up to a mean over all."""
        weight = 1 / max(1, sum(map(learnt_tokens, examples)))
        ordered = sorted(examples, key=lambda example: -len(example.input_ids))
        own = examples if self._together.count == 1 else ordered[self._together.rank :: self._together.count]
        return [row_of(example, weight) for example in own], "cross_entropy"

    def _all(self, losses: Mapping[str, Future[ForwardResult]]) -> list[float]:
        """The losses of jobs, those of all processes together."""
        own = torch.tensor([loss_of(future) for future in losses.values()], dtype=torch.float64)
        found: list[float] = self._together.sum_(own).tolist()
        return found

    def _account(
        self,
        found: Iterable[tuple[ActiveJob, float, float]],
        tokens: Mapping[str, int],
        settings: Mapping[str, AdamSettings],
        seconds: float,
    ) -> None:
        """Note the loss and the gradient's norm of each job; those whose numbers are not finite fail."""
        reports, failures = [], {}
        for job, loss, norm in found:
            name, count, rate = job.name, tokens[job.name], settings[job.name]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                failures[name] = _divergence(job.progress.step + 1, rate, loss, norm)
                continue
            job.stepped(loss, count)
            done = job.progress.step
            reports.append(StepReport(name, done, job.prepared.steps, loss, norm, rate.learning_rate, count))
        self._tell("on_step", reports, seconds)
        self._fail(failures)

    def _fail(self, failures: Mapping[str, str]) -> None:
        for name, reason in failures.items():
            job = self._take_out(name)
            self.failed[name] = reason
            logger.warning("job %s failed: %s", name, reason)
            self._end(job.result(JobStatus.FAILED, reason))
        self._engine.run()

    def _take_out(self, name: str) -> ActiveJob:
        self._engine.remove(name)
        return self.active.pop(name)

    def _evaluate(self, due: Iterable[ActiveJob]) -> None:
        """The held-out losses of these jobs, in common batches."""
        chosen = list(due)
        if not chosen:
            return
        losses = {
            job.name: self._engine.forward(job.name, *self._own(job.prepared.data.held_out), all_logprobs=False)
            for job in chosen
        }
        self._engine.run()
        for job, loss in zip(chosen, self._all(losses), strict=True):
            if job.evaluated(loss):
                job.best_row = self.bank.family_of(job.name).row(job.name)
            self._tell("on_evaluation", job.name, job.progress.step, loss)

    def _leave(self, done: Sequence[ActiveJob]) -> None:
        for job in done:
            self._end(self._finish(job, self.bank))
            self._take_out(job.name)
        self._engine.run()

    def _end(self, result: JobResult) -> None:
        self.results[result.name] = result
        self._tell("on_end", result)

    def _tell(self, event: str, *arguments: Any) -> None:
        for observer in self._observers:
            getattr(observer, event)(*arguments)


def learnt_tokens(example: Example) -> int:
    """How many tokens of an example are learnt."""
    return sum(label != IGNORED for label in example.labels[1:])


def row_of(example: Example, weight: float) -> TrainingRow:
    """An example for the engine: each token but the last predicts the next one, where that is learnt."""
    labels = torch.tensor(example.labels[1:])
    is_learnt = labels != IGNORED
    return TrainingRow(torch.tensor(example.input_ids[:-1]), labels * is_learnt, is_learnt * weight)


def loss_of(future: Future[ForwardResult]) -> float:
    """The loss of a call that is done; not finite where it was refused for that."""
    error = future.exception()
    if isinstance(error, NotFinite):
        return math.nan if error.loss is None else error.loss
    return future.result().loss


def norm_of(future: Future[StepResult]) -> float:
    """The norm of the gradient of a step that is done; NaN where there was none."""
    error = future.exception()
    return math.nan if error is not None else future.result().gradient_norm


def _divergence(step: int, settings: AdamSettings, loss: float, norm: float) -> str:
    return (
        f"step {step}: got loss {loss:g} and gradient norm {norm:g}; wanted finite numbers; lower the learning rate "
        f"({settings.learning_rate:g} here; `roadie find-lr` searches one), or clip harder "
        f"(max_grad_norm={settings.max_grad_norm:g})"
    )
