"""What a configuration lacks in the records, run after run, each kept at once; started again, it goes on where it was."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_name
from benchmarks.quality import records
from benchmarks.quality.hub.methods import METHODS
from benchmarks.quality.hub.settings import SEARCH, Search, TaskSettings, read
from benchmarks.quality.hub.task import Prepared, prepare, width_of
from benchmarks.quality.hub.training import run
from benchmarks.quality.methods import Method, nearest_exponent, rate
from benchmarks.quality.search import costs, next_listed, next_run
from benchmarks.record import RESULTS, rounded
from roadie.errors import ConfigError
from roadie.learning_rate import default_learning_rate

BASE = "base"
NOT_OF_A_RUN = {"title", "published", "methods", "recipe", "once", "directions", "seeds"}
Stage = tuple[Method, Any, Sequence[int]]


def records_folder(results: Path = RESULTS) -> Path:
    """Where the records of this machine are, apart from those of docs/quality.md."""
    return results / machine_name() / "quality-hub"


@dataclass(frozen=True)
class Choice:
    """What of a configuration is to be run, and what of it is replaced; empty: everything, nothing.

    seeds: how many of the configuration's; data: where the paths of files begin.
    """

    tasks: Sequence[str] = ()
    methods: Sequence[str] = ()
    seeds: int | None = None
    model: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    data: Path = field(default_factory=Path)


def sweep(path: Path, choice: Choice, folder: Path, stop: Callable[[], bool]) -> int:
    """Train what the records in `folder` lack of a configuration, until `stop()`; gives the number of runs."""
    chosen = chosen_tasks(path, choice)
    _check_device(choice.device)
    facts, count = {**records.provenance(), "device": device_name(choice.device)}, 0
    logging.getLogger("roadie").setLevel(logging.ERROR)  # every row that is cut would be told of, each time it is read
    for part in ("methods", "recipe", "once", "directions"):
        for name, settings in chosen.items():
            if not stop() and getattr(settings, part):
                prepared = prepare(name, settings, choice.data, choice.device)
                count += _task(prepared, folder, facts, stop, _stages(prepared, part))
    return count


def chosen_tasks(path: Path, choice: Choice) -> dict[str, TaskSettings]:
    """The tasks of a configuration by the name of their records, as the choice has them; nothing is loaded.

    Raises `ConfigError` for tasks and methods that are not known.
    """
    found = read(path)
    _check_known("tasks", choice.tasks, list(found))
    _check_known("methods", choice.methods, list(METHODS))
    tasks = {name: _changed(found[name], choice) for name in choice.tasks or found}
    return {f"{name}.{Path(task.model.name).name}": task for name, task in tasks.items()}


def _check_known(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(f"got {what} {', '.join(unknown)}; wanted some of {', '.join(known)}; correct the name")


def _changed(settings: TaskSettings, choice: Choice) -> TaskSettings:
    model = {"name": choice.model or settings.model.name, "dtype": choice.dtype or settings.model.dtype}
    told = {**settings.directions, **settings.once, **settings.methods}
    methods = {name: told.get(name, SEARCH) for name in choice.methods} or settings.methods
    if choice.seeds is not None and not 0 < choice.seeds <= len(settings.seeds):
        raise ConfigError(
            f"got {choice.seeds} seeds; wanted 1 to {len(settings.seeds)}, as many as the configuration has; lower it"
        )
    new = {
        "model": settings.model.model_copy(update=model),
        "methods": methods,
        "recipe": tuple(name for name in settings.recipe if name in methods),
        **({"once": {}, "directions": {}} if choice.methods else {}),
        "seeds": settings.seeds[: choice.seeds],
    }
    return settings.model_copy(update=new)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"got --device {device}: {reason}; wanted a device that torch has here; try cpu") from None


def device_name(device: str) -> str:
    """What computes: the GPU by its name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _task(
    prepared: Prepared, folder: Path, facts: records.Record, stop: Callable[[], bool], stages: Iterable[Stage]
) -> int:
    path = folder / f"{prepared.name}.jsonl"
    _begin(prepared, path, facts)
    count = 0
    for method, rates, seeds in stages:
        while method.suits(prepared.task) and not stop():
            following = _next(prepared, path, method, rates, seeds)
            if following is None:
                break
            records.add(path, _record(prepared, method, *following, facts, records.read(path)))
            count += 1
    return count


def _stages(prepared: Prepared, part: str) -> Iterator[Stage]:
    """All searches for a rate come before the other seeds, which `methods` alone have."""
    settings, task = prepared.settings, prepared.task
    if part == "recipe":
        rows = len(task.splits.train)
        batch = task.batch_rows * settings.training.accumulation
        by_rule = (default_learning_rate(width_of(settings.model), rows, task.steps * batch / rows, batch),)
        yield from ((METHODS[name], by_rule, settings.seeds[:1]) for name in settings.recipe)
        return
    for seeds in (settings.seeds[:1], settings.seeds) if part == "methods" else (settings.seeds[:1],):
        for name, rates in getattr(settings, part).items():
            yield METHODS[name], rates, seeds


def _next(prepared: Prepared, path: Path, method: Method, rates: Any, seeds: Sequence[int]) -> tuple[float, int] | None:
    """The learning rate and seed of the next run of a method."""
    found = records.read(path)
    if isinstance(rates, tuple):
        return next_listed(found, method.name, rounded(list(rates)), seeds)
    if isinstance(rates, Search):
        method = replace(method, first={prepared.task.kind: nearest_exponent(rates.start)})
    following = next_run(found, method, prepared.task.kind, seeds)
    return None if following is None else (rate(following[0]), following[1])


def _record(
    prepared: Prepared,
    method: Method,
    learning_rate: float,
    seed: int,
    facts: records.Record,
    earlier: Sequence[records.Record],
) -> records.Record:
    """A whole record of one run."""
    rivals = {} if prepared.settings.evaluation.beaten else costs(earlier, method.name, seed)
    head = {
        "task": prepared.name,
        "method": method.name,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": prepared.task.steps,
    }
    done = trained(prepared, method, learning_rate, seed, min(rivals.values(), default=math.inf))
    return {**head, **done, **facts}


def trained(
    prepared: Prepared, method: Method, learning_rate: float, seed: int, beaten_at: float = math.inf
) -> records.Record:
    """One run, which is said: what it measured, without what makes it another than others."""
    _free_memory()
    task, training = prepared.task, prepared.settings.training
    done = run(task, training, prepared.judge, method, learning_rate, seed, task.model(), beaten_at)
    said = {split: done[split] and round(-done[split]["cost"], 4) for split in ("validation",)}
    print(prepared.name, method.name, f"{learning_rate:g}", seed, said, f"{done['wall_s']:.1f} s", flush=True)
    return done


def _free_memory() -> None:
    """The model of the run before is in cycles; a second one of its size might not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _begin(prepared: Prepared, path: Path, facts: records.Record) -> None:
    """The first line of a file: what the runs are told, and the model as it comes, where that is asked for.

    A file of other settings is begun anew where it has no run; where it has, they could not be compared: `ConfigError`.
    """
    told = rounded(prepared.settings.model_dump(mode="json", exclude=NOT_OF_A_RUN))
    if Path(told["model"]["name"]).is_dir():
        told["model"]["name"] = Path(told["model"]["name"]).resolve().name  # not where it lies on this machine
    found = records.read(path)
    if found and (len(found) > 1 or found[0]["facts"]["settings"] == told):
        _check_same(path, found[0]["facts"]["settings"], told)
        return
    path.unlink(missing_ok=True)
    task = prepared.task
    scores: dict[str, Any] = {"validation": None, "test": None}
    if prepared.settings.evaluation.base and not task.head:
        model = task.model()
        scores = {split: prepared.judge(task, model, split) for split in scores}
    words = {"title": prepared.settings.title, "published": prepared.settings.published}
    head = {"task": prepared.name, "method": BASE, "learning_rate": 0.0, "seed": 0, "steps": 0}
    records.add(path, {**head, "facts": {**(task.facts or {}), **words, "settings": told}, **scores, **facts})


def _check_same(path: Path, recorded: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    different = [key for key in told if recorded.get(key) != told[key]]
    if different:
        raise ConfigError(
            f"{path}: got records of runs with other settings ({', '.join(different)}); wanted those of this "
            "configuration, or none; give another folder with --records, or move the file away"
        )
