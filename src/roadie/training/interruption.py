"""Ctrl-C in something long: what has been done is kept, and the exception says what that is.

    with told(lambda: kept_in(folder)):            whatever is interrupted in here raises `Interrupted`
        with StopRequest("after this step") as stop:   the first Ctrl-C asks, the second one ends at once
            while not stop.asked: ...

Imports nothing heavy.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

logger = logging.getLogger("roadie")


@dataclass(frozen=True)
class Kept:
    """What an interruption leaves. text: in words; can_go_on: whether the same command goes on from it with --resume."""

    text: str
    can_go_on: bool = False


NOTHING = Kept("Nothing is kept: no checkpoint was written yet.")


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that knows what is kept."""

    def __init__(self, kept: Kept) -> None:
        super().__init__(kept.text)
        self.kept = kept


@contextmanager
def told(kept: Callable[[], Kept]) -> Iterator[None]:
    """Within the block a KeyboardInterrupt becomes an `Interrupted` with what `kept` finds then."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(kept()) from None


class StopRequest:
    """Within the block the first SIGINT is a request, `asked`; a second one interrupts at once, as the first did before.

    Only where Ctrl-C would raise KeyboardInterrupt in this thread, and where `enabled` (several processes do not agree on
    the step to stop after); elsewhere nothing is ever asked.
    """

    def __init__(self, when: str, *, enabled: bool = True) -> None:
        self.asked = False
        self._enabled = enabled
        self._when = when
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        before = signal.getsignal(signal.SIGINT)
        if (
            self._enabled
            and threading.current_thread() is threading.main_thread()
            and before is signal.default_int_handler
        ):
            self._before = before
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self._give_back()
        logger.warning("stopping %s, with a checkpoint; Ctrl-C again stops at once, without one", self._when)

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
