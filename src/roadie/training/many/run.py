"""Training many adapters at once, from texts to folders.

    train_many("jobs.yaml", resume=True)

Everything is checked before the first step: settings, targets and outputs of every job raise, since they are mistakes in
what was asked for; data that cannot be read fail their job alone. The output of a job appears whole as soon as it is done.

Several processes, started by accelerate or torchrun, share the jobs, or the rows of all jobs (`roadie.training.many.sharing`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from roadie.bank.trainable import TrainableBank
from roadie.distributed.processes import join
from roadie.training.interruption import told
from roadie.training.many.job import Job, RunSettings
from roadie.training.many.jobs_file import Plan, read_jobs
from roadie.training.many.logs import Logs
from roadie.training.many.observer import Observer
from roadie.training.many.outputs import adapter_of, finished_result, write_output
from roadie.training.many.preparation import Prepared, prepare, run_settings
from roadie.training.many.rate_warnings import RateWarnings
from roadie.training.many.result import JobResult, JobStatus, ManyResult
from roadie.training.many.saved import saved_in
from roadie.training.many.session import Session
from roadie.training.many.sharing import Sharing, Spread
from roadie.training.many.snapshot import Snapshot, read_snapshot, write_snapshot
from roadie.training.many.state import ActiveJob
from roadie.training.many.work import Work, check_work, close_work, default_work, former_rates, open_work
from roadie.training.models import ModelSource, as_source


def train_many(
    jobs: str | Path | Plan | Sequence[Job | Mapping[str, Any]],
    *,
    model: str | ModelSource | None = None,
    settings: RunSettings | None = None,
    work: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    spread: str | Spread = Spread.JOBS,
) -> ManyResult:
    """Train an adapter for each job, all at once on one base model, and write each to its output folder.

    jobs: a jobs file (`roadie.training.many.jobs_file`), or jobs (or mappings in the words of a jobs file).
    model, settings: replace those of the jobs file. work: folder for checkpoints and logs; None: ``NAME.training`` beside
    the jobs file NAME.yaml, or ``train-many.training`` beside the first output. overwrite: replace outputs that are there;
    resume: go on with an interrupted run, or start it where there is none; finished jobs are left as they are.
    spread: over several processes: "jobs" (each trains its part of them; observers hear of these) or "rows".
    Raises `RoadieError` for what cannot be trained, before anything is written; data that cannot be read and losses that
    are not finite fail their own job only, as the result says.
    """
    plan, together = _plan(jobs, settings), join()
    sharing = Sharing.of(together, spread, plan)
    source = _source(plan, model)
    folder = Path(work) if work is not None else _default_work(jobs, plan)
    checked = together.first(lambda: check_work(folder, plan.jobs, overwrite=overwrite, resume=resume))
    former = together.first(lambda: former_rates(folder) if resume else {})
    prepared = together.each(lambda: prepare(sharing.own(plan), source, former))
    own = prepared.plan
    description = sharing.described(run_settings(own, source, prepared))
    opened = together.first(lambda: open_work(checked, description))
    started = time.perf_counter()
    ended, steps = _Run(own, source, prepared, opened, sharing).through(observers)
    found = {name: result for part in together.gather(ended) for name, result in part.items()}
    results = tuple(found[job.name] for job in plan.jobs)
    together.first(lambda: close_work(opened, description, {result.name: _outcome(result) for result in results}))
    return ManyResult(results, folder, max(together.gather(steps)), time.perf_counter() - started)


def _plan(jobs: Any, settings: RunSettings | None) -> Plan:
    if isinstance(jobs, Plan):
        plan = jobs
    elif isinstance(jobs, (str, Path)):
        plan = read_jobs(jobs)
    else:
        made = tuple(job if isinstance(job, Job) else Job.from_mapping(job) for job in jobs)
        plan = Plan(made, settings or RunSettings())
    return plan if settings is None else replace(plan, settings=settings)


def _source(plan: Plan, model: str | ModelSource | None) -> ModelSource:
    asked = as_source(model)
    if asked.name is not None:
        return asked
    return replace(asked, name=plan.model, revision=asked.revision or plan.revision)


def _default_work(jobs: Any, plan: Plan) -> Path:
    return Path(jobs).with_suffix(".training") if isinstance(jobs, (str, Path)) else default_work(plan.jobs)


def _outcome(result: JobResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key not in ("name", "output") and value is not None}


@dataclass(frozen=True, eq=False)
class _Run:
    """Everything that was prepared, on its way through the steps."""

    plan: Plan
    source: ModelSource
    prepared: Prepared
    work: Work
    sharing: Sharing

    def through(self, observers: Sequence[Observer]) -> tuple[dict[str, JobResult], int]:
        """Train to the end; the results by job, and the steps of this session."""
        snapshot = read_snapshot(self._snapshots) if self.work.goes_on else None
        ended = self._ended_before(snapshot)
        self.sharing.of_rows.wait()  # until all have read what only one of them will write
        logs = Logs(self.work.path) if self.sharing.writes else None
        all_observers = [*observers] if logs is None else [logs, *observers, RateWarnings(logs.history)]
        try:
            session = self._session(snapshot, ended, logs, all_observers)
            before = session.step
            self._announce(session, ended, logs, all_observers)
            with told(lambda: saved_in(self.work.path)):
                session.run()
        finally:
            if logs is not None:
                logs.close()
        return {**ended, **session.results}, session.step - before

    @property
    def _snapshots(self) -> Path:
        return self.sharing.snapshots(self.work.path)

    def _ended_before(self, snapshot: Snapshot | None) -> dict[str, JobResult]:
        """Jobs that take no part: finished or failed in a former session, or without data."""
        failed = {**self.prepared.unread, **(snapshot.failed if snapshot is not None else {})}
        ended = {}
        for job in self.plan.jobs:
            before = finished_result(job, self.work.mark) if self.work.goes_on else None
            if before is not None:
                ended[job.name] = before
            elif job.name in failed:
                ended[job.name] = JobResult(job.name, Path(job.output), JobStatus.FAILED, failed[job.name])
        return ended

    def _session(
        self,
        snapshot: Snapshot | None,
        ended: Mapping[str, JobResult],
        logs: Logs | None,
        observers: Sequence[Observer],
    ) -> Session:
        def finish(job: ActiveJob, bank: TrainableBank) -> JobResult:
            return self._finish(job, bank, logs)

        def save(session: Session) -> None:
            if logs is None:
                return
            logs.flush()
            self._snapshots.mkdir(exist_ok=True)
            write_snapshot(self._snapshots, session.step, session.bank, session.active, session.failed)

        todo = [one for name, one in self.prepared.jobs.items() if name not in ended]
        of_rows = self.sharing.of_rows
        session = Session(self.prepared.base, todo, self.plan.settings, observers, finish, save, of_rows)
        if snapshot is not None:
            session.failed.update(snapshot.failed)
            session.go_on(snapshot)
        return session

    def _finish(self, job: ActiveJob, bank: TrainableBank, logs: Logs | None) -> JobResult:
        """Write the output of a job that has done all of its steps, in the process that writes."""
        result = job.result(JobStatus.FINISHED)
        if logs is None:
            return result
        family = bank.family_of(job.name)
        row = job.best_row if job.best_row is not None else family.row(job.name)
        adapter = adapter_of(family, row, job.prepared.config)
        history, work = logs.history(job.name), self.work
        write_output(job.prepared, adapter, result, history, mark=work.mark, overwrite=work.overwrite)
        return result

    def _announce(
        self, session: Session, ended: Mapping[str, JobResult], logs: Logs | None, observers: Sequence[Observer]
    ) -> None:
        """Who was told of a job's end in a former session, by its log, is not told again; all others hear of everything."""
        todo = {name: one for name, one in self.prepared.jobs.items() if name not in ended}
        steps = {name: job.progress.step for name, job in session.active.items()}
        if logs is not None:
            logs.rewind({name: steps.get(name) for name in [*todo, *self.prepared.unread]})
        for observer in observers:
            observer.on_start(self.plan.jobs, {name: one.steps for name, one in todo.items()})
            for name, job in session.active.items():
                observer.on_join(name, job.progress.step)
        for name, result in ended.items():
            for observer in observers:
                if observer is not logs or name in self.prepared.unread:
                    observer.on_end(result)
