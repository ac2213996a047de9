"""One thread for whatever the engine must not wait for, in the order in which it comes: files, and results."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_log = logging.getLogger("roadie.train_service")


class Tasks:
    """See the module; what comes after the end is left out, since a service goes on from what it has written down."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="roadie-tinker")
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def submit(self, task: Callable[..., None], *args: Any) -> None:
        """From any thread; returns at once."""
        with self._lock:
            if not self._closed.is_set():
                self._worker.submit(_done, task, args)

    def every(self, seconds: float, task: Callable[[], None]) -> None:
        """Do something again and again."""

        def repeat() -> None:
            while not self._closed.wait(seconds):
                self.submit(task)

        threading.Thread(target=repeat, name="roadie-tinker-clock", daemon=True).start()

    def close(self) -> None:
        """What has come is done first."""
        with self._lock:
            self._closed.set()
        self._worker.shutdown(wait=True)


def _done(task: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        task(*args)
    except Exception:
        _log.exception("a task of the training service failed")
