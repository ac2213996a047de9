"""The thread that loads adapters, and how it keeps out of the way of the requests that run.

What a load costs a running request is the time for which the loader computes: the two share the processor, and Python's lock,
which a forward takes back after each of its thousands of operations. So the loader

- has a low priority, where threads have one of their own, and one torch thread;
- rests after each task, while requests run, for so many times the processor time that the task took: `MOST_REST` times
  where no request waits for an adapter, and less the more adapters are waited for, compared with the requests that run.

A single load is never delayed by this: the rest comes after it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_REST = 14.0
IDLE_AFTER_S = 0.2
"""Requests come in turns: an engine without any has not come to rest until so long after its last step."""
_NICENESS = 10
_NAP_S = 0.005
Result = TypeVar("Result")


def rest_per_work(num_running: int, num_waiting: int) -> float:
    """How long to rest after a task, in units of what it took.

    num_running: requests that a load disturbs; num_waiting: adapters and blends that requests wait for.
    """
    return min(MOST_REST, num_running / num_waiting) if num_waiting else MOST_REST * (num_running > 0)


class Loader:
    """Tasks, one after another, in a thread that gives way to others; see the module."""

    def __init__(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        self._num_running, self._num_waiting = num_running, num_waiting
        self._worked_s = self._ended_s = 0.0
        self._is_closed = threading.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="roadie-adapters", initializer=_give_way)

    def submit(self, task: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Do something when its turn comes."""
        return self._worker.submit(self._in_turn, lambda: task(*arguments))

    def close(self) -> None:
        """End after the task that runs; those that wait are cancelled."""
        self._is_closed.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _in_turn(self, task: Callable[[], Result]) -> Result:
        self._rest()
        begin_s = time.thread_time()
        try:
            return task()
        finally:
            self._worked_s, self._ended_s = time.thread_time() - begin_s, time.monotonic()

    def _rest(self) -> None:
        """Until the last task has been made up for; looks up now and then, for requests come and go."""
        while not self._is_closed.is_set():
            rest_s = self._worked_s * rest_per_work(self._num_running(), self._num_waiting())
            left_s = self._ended_s + rest_s - time.monotonic()
            if left_s <= 0:
                return
            self._is_closed.wait(min(left_s, _NAP_S))


def _give_way() -> None:
    """A low priority, where threads have their own, and one torch thread, for this thread alone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch keeps a number for each thread and one for threads that are new; the latter is put back by such a one.
    restoring = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    restoring.start()
    restoring.join()
