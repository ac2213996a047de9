"""What the recipe of `roadie train` rests on: schedules and targets, at the default learning rate, run after run.

    python -m benchmarks.quality recipe --minutes 40      trains what the records lack, and makes docs/recipe.md

One thing is changed at a time. The order goes by seeds, so that a run which is cut short has seen every choice alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.machine import machine_name
from benchmarks.quality import plan, records
from benchmarks.quality.methods import METHODS
from benchmarks.quality.sweep import base
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import Schedule, run
from benchmarks.record import RESULTS
from roadie.training.recipe import default_learning_rate

RECORDS_NAME = "quality-recipe.jsonl"
TASKS = ("language-topics", "language-asyncio", "docstring-package")
VARIANTS = ("road_1", "road_2")
SEEDS = (0, 1, 2)
WIDTHS = {"language": 256, "docstring": 384, "summary": 384}
ALL = "all linear"
TARGETS: Mapping[str, Mapping[str, str | list[str]]] = {
    "attention": {
        "language": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "docstring": ["query", "key", "value", "attention.output.dense"],
    },
    "mlp": {
        "language": ["gate_proj", "up_proj", "down_proj"],
        "docstring": r".*\.layer\.\d+\.(intermediate|output)\.dense",
    },
    "q and v": {"language": ["q_proj", "v_proj"], "docstring": ["query", "value"]},
}
"""Modules by the first word of a task's name; "q and v" is what PEFT adapts unless it is told."""


@dataclass(frozen=True)
class Choice:
    """One recipe: schedule after the warm-up, the warm-up's share of the steps, and a name of TARGETS or ALL."""

    schedule: str = "linear"
    warm_up: float = 0.1
    targets: str = ALL

    @property
    def name(self) -> str:
        """As the document calls it."""
        return self.targets if self.targets != ALL else f"{self.schedule}, warm-up {self.warm_up:g}"


DEFAULT = Choice()
SCHEDULES = tuple(Choice(name, warm_up) for name in ("linear", "cosine", "constant") for warm_up in (0.1, 0.0))
CHOICES = (*SCHEDULES, *(Choice(targets=name) for name in TARGETS))


def kind(task: str) -> str:
    """The first word of a task's name."""
    return task.partition("-")[0]


def learning_rate(task: str) -> float:
    """The default for the width of the task's model."""
    return default_learning_rate(WIDTHS[kind(task)])


def schedule_of(choice: Choice) -> Schedule:
    """The share of the peak rate at a step (from 0) of `steps`; the first step of a warm-up has a rate above 0."""

    def factor(step: int, steps: int) -> float:
        warm_up = math.ceil(choice.warm_up * steps)
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up + (warm_up > 0)) / (steps - warm_up + (warm_up > 0))
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[choice.schedule]

    return factor


def missing(found: Sequence[records.Record]) -> Iterator[tuple[Choice, str, str, int]]:
    """Choice, task, variant and seed of the runs that are not among the records, in the order in which they are trained."""
    done = {(record["choice"], record["task"], record["method"], record["seed"]) for record in found}
    for seed in SEEDS:
        for task in TASKS:
            for variant in VARIANTS:
                for choice in CHOICES:
                    if (choice.name, task, variant, seed) not in done:
                        yield choice, task, variant, seed


def train_missing(path: Path, stop: Callable[[], bool]) -> int:
    """Train what the records lack until `stop()` or the end; gives the number of runs."""
    facts, count = records.provenance(), 0
    for choice, task, variant, seed in missing(records.read(path)):
        if stop():
            break
        records.add(path, {**one_run(choice, plan.task(task), variant, seed), **facts})
        count += 1
    return count


def adapted_task(choice: Choice, task: Task) -> Task:
    """The task with the targets of a choice."""
    return task if choice.targets == ALL else replace(task, targets=TARGETS[choice.targets][kind(task.name)])


def one_run(choice: Choice, task: Task, variant: str, seed: int) -> records.Record:
    """What one run gives, without its provenance."""
    rate, share = learning_rate(task.name), schedule_of(choice)
    head = {"choice": choice.name, "task": task.name, "method": variant, "learning_rate": rate, "seed": seed}
    given = run(adapted_task(choice, task), METHODS[variant], rate, seed, base(task.name), share)
    print(*head.values(), given["validation"] and round(given["validation"]["loss"], 4), flush=True)
    return {**head, "steps": task.steps, **given}


def records_path() -> Path:
    """The records of this machine."""
    return RESULTS / machine_name() / RECORDS_NAME
