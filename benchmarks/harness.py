"""Timing rivals against each other: interleaved in one process, many short rounds, nothing but the rival inside the clock.

A round times every rival once, so that whatever the machine does in that moment (another process, a slower clock) hits
all of them; ratios are taken within rounds and never between medians of different moments. The order of a round is a row
of a Williams square: over a cycle each rival stands at each place and follows each other rival equally often, because
what ran before leaves its tensors in the caches and its pages in the allocator.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long a case may take: rounds go on until `seconds` are over, but there are min_rounds to max_rounds of them.

    A call shorter than shortest_sample_s is repeated: perf_counter and the loop cost about 0.1 us each, and waiting for
    a GPU about 10. processor_time: count the time that the processor spends in the calling thread, which other work on the
    machine does not prolong; not for rivals that compute on several threads or on a GPU.
    """

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 400
    warm_up_calls: int = 2
    shortest_sample_s: float = 200e-6
    processor_time: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """What the rivals are timed with."""
        return time.thread_time if self.processor_time else time.perf_counter


@dataclass(frozen=True)
class Rounds:
    """Seconds a call of each rival in each round, the rivals' lists being paired by round; `calls`: calls in a sample."""

    times_s: dict[str, list[float]]
    calls: int

    @property
    def count(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.times_s.values())))


def measure(rivals: Mapping[str, Run], budget: Budget, synchronise: Run | None = None) -> Rounds:
    """Time the rivals in interleaved rounds.

    synchronise: called before the clock is read, for devices that work asynchronously. Raises whatever a rival raises.
    """
    with _undisturbed():
        calls = _warm_up(rivals, budget, synchronise)
        times_s: dict[str, list[float]] = {name: [] for name in rivals}
        deadline = time.perf_counter() + budget.seconds
        for index, order in enumerate(orders(list(rivals))):
            if index >= budget.max_rounds or (index >= budget.min_rounds and time.perf_counter() > deadline):
                break
            for name in order:
                times_s[name].append(_sample_s(rivals[name], calls, synchronise, budget.clock))
    return Rounds(times_s, calls)


def orders(names: list[str]) -> Iterator[list[str]]:
    """Without end: the order of each round; a cycle holds each rival at each place, and after each other, equally often."""
    count = len(names)
    steps = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2 ...
    while True:
        for mirrored in (1, -1) if count % 2 else (1,):  # an odd square needs its mirror image to be balanced
            for turn in range(count):
                yield [names[(turn + mirrored * step) % count] for step in steps]


def _warm_up(rivals: Mapping[str, Run], budget: Budget, synchronise: Run | None) -> int:
    """Call each rival a few times, and give how many calls make a sample; without warm-up (calls of seconds) one.

    First calls pay for tables, thread pools and code that is chosen at run time.
    """
    if not budget.warm_up_calls:
        return 1
    times_s = [
        _sample_s(run, 1, synchronise, budget.clock) for run in rivals.values() for _ in range(budget.warm_up_calls)
    ]
    return max(1, math.ceil(budget.shortest_sample_s / min(times_s)))


def _sample_s(run: Run, calls: int, synchronise: Run | None, clock: Callable[[], float]) -> float:
    if synchronise is not None:
        synchronise()
    start = clock()
    for _ in range(calls):
        run()
    if synchronise is not None:
        synchronise()
    return (clock() - start) / calls


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
