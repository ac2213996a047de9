"""Ctrl-C in something long: what has been done is kept, and the exception says what that is.

    with told(lambda: saved_in(folder)):    whatever is interrupted in here raises `Interrupted`
        with stop_request() as stop:        the first Ctrl-C asks, the second one ends at once
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

logger = logging.getLogger("roadie")


@dataclass(frozen=True)
class Saved:
    """What an interruption leaves. text: in words; can_go_on: whether the same command goes on from it with --resume."""

    text: str
    can_go_on: bool = False


NOTHING = Saved("Nothing is kept: no checkpoint was written yet.")


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that knows what is saved."""

    def __init__(self, saved: Saved) -> None:
        super().__init__(saved.text)
        self.saved = saved


@contextmanager
def told(saved: Callable[[], Saved]) -> Iterator[None]:
    """Within the block a KeyboardInterrupt becomes an `Interrupted` with what `saved` finds then."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(saved()) from None


class StopRequest:
    """Whether the end of something long was asked for."""

    asked = False


@contextmanager
def stop_request(*, enabled: bool = True) -> Iterator[StopRequest]:
    """Within the block the first SIGINT is a request, and a second one interrupts at once, as the first did before.

    Only where Ctrl-C would raise KeyboardInterrupt in this thread, and where `enabled` (several processes do not agree on
    the step to stop after); elsewhere nothing is ever asked.
    """
    request, before = StopRequest(), signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (enabled and in_main_thread and before is signal.default_int_handler):
        yield request
        return

    def ask(number: int, frame: object) -> None:
        request.asked = True
        signal.signal(signal.SIGINT, before)
        logger.warning("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one")

    signal.signal(signal.SIGINT, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
