"""The thread that has all jobs under way: it starts those whose turn it is, and goes on with whoever's future has come.

A job whose turn it is: of the tenant with the fewest jobs in training, the oldest. What a job cannot go on with fails that job; a
failure that cannot be written down (a full disk) is written down later.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from roadie.errors import CheckpointError, NotFinite, QueueFull, RoadieError, ShuttingDown, StateNotWritten
from roadie.train_service.fine_tuning.course import Bench, Course, JobFailed, train, validate
from roadie.train_service.fine_tuning.data import NotWanted
from roadie.train_service.fine_tuning.jobs import UNFINISHED, Job

_log = logging.getLogger("roadie")
RETRY_S = 1.0
MAX_VALIDATING = 4


class Runner:
    """See the module. `wake` it when a job has come, or is to stop; from any thread."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._courses: dict[str, Course] = {}
        self._jobs: dict[str, Job] = {}
        self._unsaid: list[Callable[[], object]] = []
        self._is_stopping = self._is_to_retry = False
        self._thread = threading.Thread(target=self._run, name="roadie-fine-tuning", daemon=True)

    def start(self) -> None:
        """Take up whatever has not ended."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more; what trains goes on from its kept state when the server is started again."""
        self._is_stopping = True
        self.wake()
        self._thread.join()
        self._bench.others.shutdown(cancel_futures=True)

    def wake(self) -> None:
        """Look at the jobs again."""
        self._news.put(None)

    def _run(self) -> None:
        self._tidy()
        self._look()
        while not self._is_stopping:
            try:
                news = self._news.get(timeout=RETRY_S if self._unsaid or self._is_to_retry else None)
            except queue.Empty:
                news = None
            (news or self._look)()
        for course in self._courses.values():
            course.close()

    def _look(self) -> None:
        """Say what could not be said, and start whose turn it is."""
        self._is_to_retry = False
        try:
            while self._unsaid:
                self._unsaid[0]()
                del self._unsaid[0]
            self._start_all()
        except StateNotWritten as error:
            _log.error("fine-tuning waits: %s", error)
            self._is_to_retry = True
        except Exception:
            _log.exception("fine-tuning waits")
            self._is_to_retry = True

    def _tidy(self) -> None:
        """Remove what jobs that have ended had kept to go on, and what no job got to the end of writing."""
        bench = self._bench
        unfinished = {job.id for job in bench.jobs.with_status(*UNFINISHED)}
        served = set(bench.jobs.places.values())
        for path in (*bench.states.iterdir(), *bench.models.iterdir()):
            if (
                path.name.rpartition("-ckpt-")[0] not in unfinished
                and path.name not in unfinished
                and path not in served
            ):
                shutil.rmtree(path, ignore_errors=True)

    def _start_all(self) -> None:
        jobs, most = self._bench.jobs, self._bench.limits.max_training
        waiting = [
            job for job in jobs.with_status("validating_files", "queued", "running") if job.id not in self._courses
        ]
        for job in waiting:
            if job.status == "validating_files" and self._num("validating_files") < MAX_VALIDATING:
                self._begin(job, validate(self._bench, job))
        waiting = [job for job in waiting if job.status != "validating_files"]
        while waiting and len(self._courses) - self._num("validating_files") < most:
            job = whose_turn(waiting, self._jobs.values())
            waiting.remove(job)
            if job.status == "running" or jobs.move(job.id, ("queued",), "running", "Fine-tuning job started"):
                self._begin(job, train(self._bench, job))

    def _num(self, status: str) -> int:
        return sum(job.status == status for job in self._jobs.values())

    def _begin(self, job: Job, course: Course) -> None:
        self._courses[job.id], self._jobs[job.id] = course, job
        self._go_on(job, lambda: next(course))

    def _go_on(self, job: Job, send: Callable[[], Future[Any]]) -> None:
        """Let a course go on to the next future that it waits for, or to its end."""
        try:
            future = send()
        except StopIteration:
            self._end(job)
        except Exception as error:
            self._end(job, error)
        else:
            future.add_done_callback(lambda done: self._news.put(lambda: self._came(job, done)))

    def _came(self, job: Job, done: Future[Any]) -> None:
        course, error = self._courses[job.id], None if done.cancelled() else done.exception()
        if done.cancelled():
            error = CancelledError()
        if error is not None:
            raised = error
            self._go_on(job, lambda: course.throw(raised))
        else:
            self._go_on(job, lambda: course.send(done.result()))

    def _end(self, job: Job, error: Exception | None = None) -> None:
        del self._courses[job.id], self._jobs[job.id]
        if isinstance(error, QueueFull):
            _log.warning("%s waits: %s", job.id, error)
            self._is_to_retry = True
            return
        if isinstance(error, (ShuttingDown, CancelledError)):
            return
        if error is not None and not isinstance(error, NotWanted):
            code, message, param = _reason(error)
            _log.warning("%s failed: %s", job.id, message)
            faults = error.faults if isinstance(error, JobFailed) else ()
            self._unsaid.append(lambda: self._bench.jobs.fail(job.id, code, message, param, faults))
        if self._bench.jobs.status(job.id) not in UNFINISHED:
            shutil.rmtree(self._bench.states / job.id, ignore_errors=True)
        self.wake()


def whose_turn(waiting: Sequence[Job], under_way: Iterable[Job]) -> Job:
    """One that was in training before, or of the tenant with the fewest in training the oldest."""
    by_tenant = Counter(job.tenant for job in under_way if job.status != "validating_files")
    return min(waiting, key=lambda job: (job.status != "running", by_tenant[job.tenant], job.number))


def _reason(error: Exception) -> tuple[str, str, str | None]:
    """What a tenant is told of why a job cannot go on."""
    if isinstance(error, JobFailed):
        return error.code, str(error), error.param
    if isinstance(error, NotFinite):
        advice = "the loss is not finite; lower learning_rate_multiplier, or look at the rows"
        return "training_diverged", f"The job failed: {advice}.", "learning_rate_multiplier"
    if isinstance(error, (CheckpointError, OSError)):
        return "server_error", "The job failed because the server could not write, or read, what it has to keep.", None
    if not isinstance(error, RoadieError):
        _log.error("a job failed", exc_info=error)
        return "server_error", "The job failed at something that the server did not foresee; its log says where.", None
    return "job_failed", f"The job failed: {error}", None
