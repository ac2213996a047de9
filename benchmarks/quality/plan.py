"""What is trained, in which order: the most valuable comparisons first, task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

from benchmarks.quality.encoder import package_task, pair_task
from benchmarks.quality.language import language_task
from benchmarks.quality.methods import CAPACITY, METHODS, MINIMUM
from benchmarks.quality.tasks import Task
from roadie.embedded import corpus

TASKS: dict[str, Callable[[], Task]] = {
    "language-topics": partial(language_task, "topics"),
    "docstring-package": package_task,
    "language-asyncio": partial(language_task, "asyncio"),
    "summary-body": pair_task,
    "language-turtle": partial(language_task, "turtle"),
    **{f"language-{kind}": partial(language_task, kind) for kind in corpus.KINDS},
}
FIRST_TASKS = tuple(TASKS)[:5]
DEFAULT_RATE_EXPONENT = -5
"""3.2e-3, next to the rate of the paper and of `roadie train`, is measured for road_1 even where the search stays above."""


@lru_cache(maxsize=len(TASKS))
def task(name: str) -> Task:
    """The task of a name in TASKS, built once."""
    return TASKS[name]()


def stages() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Task and methods, in the order of their value; within a stage all searches come before the other seeds."""
    rest = tuple(name for name in METHODS if name not in (*MINIMUM, *CAPACITY))
    for methods, tasks in (
        (MINIMUM, FIRST_TASKS),
        (CAPACITY, FIRST_TASKS),
        (rest, FIRST_TASKS),
        ((*MINIMUM, *CAPACITY), tuple(TASKS)[5:]),
        (rest, tuple(TASKS)[5:]),
    ):
        for name in tasks:
            if methods:
                yield name, methods
