"""How long a test waits: as long as it must, since no test measures how fast a machine is. What hangs is ended all the same."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_S = 1800.0
"""After so many seconds without an end something hangs. No limit of a test is shorter; tests/architecture sees to it."""


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; fails where it never does."""
    give_up_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < give_up_s, "it never came to hold"
        time.sleep(0.005)
