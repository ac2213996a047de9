"""The steps of a run: who takes part, one forward and backward for all, and what each job does with its gradient.

    while jobs are left:  join -> step -> evaluate -> leave (finished or failed) -> checkpoint

A job's loss is the mean over its own learnt tokens; the gradient of the sum of all losses is, for each job's parameters,
that of its own loss. A job whose loss or gradient is not finite leaves before its parameters are used again; those of the
others are what they would be if it had finished at that step.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from roadie.bank.trainable import TrainableBank
from roadie.distributed.processes import Processes
from roadie.kernels import Keep
from roadie.training.interruption import stop_request
from roadie.training.many import optimiser
from roadie.training.many.job import RunSettings
from roadie.training.many.losses import ManyLosses
from roadie.training.many.observer import Observer, StepReport
from roadie.training.many.packing import Row, learnt_tokens
from roadie.training.many.result import JobResult, JobStatus
from roadie.training.many.snapshot import Snapshot, restore
from roadie.training.many.state import ActiveJob, PreparedJob

logger = logging.getLogger("roadie")

Finish = Callable[[ActiveJob, TrainableBank], JobResult]
Save = Callable[["Session"], None]


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
        self.bank = TrainableBank(model.device, Keep.INPUT if settings.keep == "input" else None)
        self.active: dict[str, ActiveJob] = {}
        self.failed: dict[str, str] = {}
        self.results: dict[str, JobResult] = {}
        self.step = 0
        self._waiting = deque(prepared)
        self._model = model
        self._settings = settings
        self._observers = observers
        self._finish = finish
        self._save = save
        self._losses = ManyLosses(model, self.bank, settings.max_tokens_per_step, together)
        self._sum = together.sum_ if together.count > 1 else None

    def go_on(self, snapshot: Snapshot) -> None:
        """Take everything up where a checkpoint left it."""
        prepared = {one.job.name: one for one in self._waiting}
        self.step = snapshot.step
        self.active = restore(snapshot, self.bank, prepared)
        self._waiting = deque(one for name, one in prepared.items() if name not in self.active)

    def run(self) -> None:
        """Train every job to its end."""
        paths = sorted({layer.path for one in self._all_prepared() for layer in one.layers})
        stoppable = self._sum is None
        with stop_request(enabled=stoppable) as stop, self.bank.attached(self._model, paths):
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

    def _all_prepared(self) -> list[PreparedJob]:
        return [*(job.prepared for job in self.active.values()), *self._waiting]

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
        self.bank.join({job.name: job.prepared.layers for job in joined})
        for job in joined:
            self._tell("on_join", job.name, 0)
        self._evaluate(job for job in joined if job.is_due_for_evaluation)

    def _step(self) -> None:
        started = time.perf_counter()
        jobs = self._jobs_by_slot()
        rows = [
            Row(example, slot) for slot, job in enumerate(jobs) for example in job.prepared.data.rows(job.progress.step)
        ]
        self.bank.make_tables()
        losses_S = self._losses.train(rows, len(jobs))
        squares = self.bank.collect_gradients(self._sum)
        losses, norms = torch.stack((losses_S, torch.cat(squares).sqrt())).tolist()
        rates = [job.rates() for job in jobs]
        begin = 0
        for family, squares_S in zip(self.bank.families, squares, strict=True):
            optimiser.step(family, rates[begin : begin + len(family.names)], squares_S)
            begin += len(family.names)
        self.step += 1
        self._account(jobs, rows, losses, norms, rates, time.perf_counter() - started)

    def _jobs_by_slot(self) -> list[ActiveJob]:
        return [self.active[name] for name in self.bank.names]

    def _account(
        self,
        jobs: Sequence[ActiveJob],
        rows: Sequence[Row],
        losses: Sequence[float],
        norms: Sequence[float],
        rates: Sequence[optimiser.Rates],
        seconds: float,
    ) -> None:
        """Note the step of each job; those whose numbers are not finite fail."""
        tokens = [0] * len(jobs)
        for row in rows:
            tokens[row.slot] += learnt_tokens(row.example)
        reports, failures = [], {}
        for job, count, loss, norm, rate in zip(jobs, tokens, losses, norms, rates, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                failures[job.name] = _divergence(rate, loss, norm)
                continue
            job.stepped(loss, count)
            done = job.progress.step
            reports.append(StepReport(job.name, done, job.prepared.steps, loss, norm, rate.learning_rate, count))
        self._tell("on_step", reports, seconds)
        self._fail(failures)

    def _fail(self, failures: Mapping[str, str]) -> None:
        for name, reason in failures.items():
            job = self.active.pop(name)
            self.failed[name] = reason
            logger.warning("job %s failed: %s", name, reason)
            self._end(job.result(JobStatus.FAILED, reason))
        if failures:
            self.bank.keep_only(list(self.active))

    def _evaluate(self, due: Iterable[ActiveJob]) -> None:
        """The held-out losses of these jobs, in common batches."""
        chosen = list(due)
        if not chosen:
            return
        slots = {name: slot for slot, name in enumerate(self.bank.names)}
        rows = [Row(example, slots[job.name]) for job in chosen for example in job.prepared.data.held_out]
        self.bank.make_tables()
        losses = self._losses.evaluate(rows, len(slots)).tolist()
        for job in chosen:
            if job.evaluated(losses[slots[job.name]]):
                job.best_row = self.bank.family_of(job.name).row(job.name)
            self._tell("on_evaluation", job.name, job.progress.step, losses[slots[job.name]])

    def _leave(self, done: Sequence[ActiveJob]) -> None:
        for job in done:
            self._end(self._finish(job, self.bank))
            del self.active[job.name]
        if done:
            self.bank.keep_only(list(self.active))

    def _end(self, result: JobResult) -> None:
        self.results[result.name] = result
        self._tell("on_end", result)

    def _tell(self, event: str, *arguments: Any) -> None:
        for observer in self._observers:
            getattr(observer, event)(*arguments)


def _divergence(rate: optimiser.Rates, loss: float, norm: float) -> str:
    return (
        f"step {rate.step}: got loss {loss:g} and gradient norm {norm:g}; wanted finite numbers; lower the learning rate "
        f"({rate.learning_rate:g} here; `roadie find-lr` searches one), or clip harder (max_grad_norm={rate.max_grad_norm:g})"
    )
