"""The sweep: run after run, each kept at once; started again, it goes on where it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from torch import nn

from benchmarks.quality import plan, records
from benchmarks.quality.methods import METHODS, Method, rate
from benchmarks.quality.search import SEEDS, next_run
from benchmarks.quality.tasks import Task, measured
from benchmarks.quality.training import run

BASE = "base"
Stop = Callable[[], bool]


def sweep(folder: Path, stop: Stop, only: Sequence[str] = ()) -> int:
    """Train what is missing in `folder`, until `stop()` or the end; gives the number of runs. only: names of tasks."""
    facts, count = records.provenance(), 0
    if not only:
        count += _at_the_default_rate(folder, facts, stop)
    for name, methods in plan.stages():
        if only and name not in only:
            continue
        path = folder / f"{name}.jsonl"
        for seeds in (SEEDS[:1], SEEDS):
            for method in methods:
                count += _method(plan.task(name), METHODS[method], seeds, path, facts, stop)
                if stop():
                    return count
    return count


def _method(task: Task, method: Method, seeds: Sequence[int], path: Path, facts: records.Record, stop: Stop) -> int:
    if not method.suits(task):
        return 0
    _measure_base(task, path, facts)
    count = 0
    while not stop():
        following = next_run(records.read(path), method, task.kind, seeds)
        if following is None:
            break
        exponent, seed = following
        records.add(path, one_run(task, method, rate(exponent), seed, facts))
        count += 1
    return count


def _at_the_default_rate(folder: Path, facts: records.Record, stop: Stop) -> int:
    """road_1 at the rate of the paper, on every task whose records have begun."""
    learning_rate, count = rate(plan.DEFAULT_RATE_EXPONENT), 0
    for name in plan.FIRST_TASKS:
        path = folder / f"{name}.jsonl"
        done = {records.key(record) for record in records.read(path)}
        if done and ("road_1", learning_rate, SEEDS[0]) not in done and not stop():
            records.add(path, one_run(plan.task(name), METHODS["road_1"], learning_rate, SEEDS[0], facts))
            count += 1
    return count


def one_run(task: Task, method: Method, learning_rate: float, seed: int, facts: records.Record) -> records.Record:
    """A whole record of one run."""
    head = {"task": task.name, "method": method.name, "learning_rate": learning_rate, "seed": seed, "steps": task.steps}
    record = {**head, **run(task, method, learning_rate, seed, base(task.name)), **facts}
    scores = {name: record[name] and round(record[name]["loss"], 4) for name in ("validation", "test")}
    print(task.name, method.name, f"{learning_rate:g}", seed, scores, f"{record['processor_s']:.1f} s", flush=True)
    return record


@lru_cache(maxsize=1)
def base(name: str) -> nn.Module:
    """The base model of a task, which runs copy."""
    return plan.task(name).model()


def _measure_base(task: Task, path: Path, facts: records.Record) -> None:
    """The first line of a file: the task's facts, and the model as it comes where it has no fresh head."""
    if records.read(path):
        return
    head = {
        "task": task.name,
        "method": BASE,
        "learning_rate": 0.0,
        "seed": 0,
        "steps": 0,
        "facts": dict(task.facts or {}),
    }
    scores = {"validation": None, "test": None}
    if not task.head:
        model = copy.deepcopy(base(task.name))
        scores = {
            "validation": measured(task, model, task.splits.validation),
            "test": measured(task, model, task.splits.test),
        }
    records.add(path, {**head, **scores, **facts})
