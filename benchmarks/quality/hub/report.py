"""A report of a folder of records: for each task the methods, at the rate that validation chose, and all rates tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality import records
from benchmarks.quality.hub.sweep import BASE
from benchmarks.quality.search import costs
from benchmarks.tables import markdown
from roadie.errors import ConfigError

Record = records.Record


def text_of(folder: Path) -> str:
    """The report, in Markdown; raises `ConfigError` where the folder has no records of configurations."""
    files = {path: records.read(path) for path in sorted(folder.glob("*.jsonl"))}
    tasks = [found for found in files.values() if found and "settings" in found[0].get("facts", {})]
    if not tasks:
        raise ConfigError(
            f"got {folder} with {len(files)} files of records, none of a configuration; wanted a folder that "
            "run --config wrote to; check --records"
        )
    return "\n".join(line for found in tasks for line in _task(found))


def _task(found: Sequence[Record]) -> Iterator[str]:
    head, runs = found[0], [record for record in found if record["method"] != BASE]
    facts = head["facts"]
    yield f"## {head['task']}\n"
    yield f"{facts['title']}. Published: {facts['published']}\n"
    yield f"Rows: {', '.join(f'{name} {count:,}' for name, count in facts['rows'].items())}.\n"
    columns = _columns(facts["settings"])
    if head["test"]:
        yield f"Without an adapter: {', '.join(f'{name} {_of(head, name, key):.4f}' for name, key in columns)}.\n"
    rows = [row for method in dict.fromkeys(run["method"] for run in runs) for row in _rows(runs, method, columns)]
    names = [*(name for name, _ in columns), "parameters", "file, kB", "s", "peak, MB", "runs on"]
    yield markdown(["method", "rate", "seeds", *names], rows)
    yield from _rates(runs)


def _columns(settings: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """What is shown of each test, and its mean over them where there are several: name, test and metric."""
    metrics = {name: (part["metric"] or settings["metric"])["kind"] for name, part in settings["tests"].items()}
    columns = [(f"{name} {metric}", (name, metric)) for name, metric in metrics.items()]
    if len(columns) > 1 and len(set(metrics.values())) == 1:
        columns.append(("mean", ("", next(iter(metrics.values())))))
    return columns


def _of(run: Record, name: str, key: tuple[str, str]) -> float:
    test, metric = key
    return float((run["test"]["sets"][test] if test else run["test"])[metric])


def _rows(runs: Sequence[Record], method: str, columns: Sequence[tuple[str, tuple[str, str]]]) -> Iterator[list[str]]:
    """The row of a method at its best rate; nothing where every run of it was stopped."""
    seed = next(run["seed"] for run in runs if run["method"] == method)
    scores = costs(runs, method, seed)
    best = min(scores, key=lambda rate: (scores[rate], rate))
    chosen = [run for run in runs if run["method"] == method and run["learning_rate"] == best and run["test"]]
    if chosen:
        yield [
            method,
            f"{best:g}",
            str(len(chosen)),
            *(_spread([_of(run, name, key) for run in chosen]) for name, key in columns),
            f"{chosen[0]['parameters']:,}",
            f"{chosen[0]['stored_bytes'] / 1000:.0f}",
            f"{mean(run['wall_s'] for run in chosen):.0f}",
            f"{max(run['peak_bytes'] for run in chosen) / 1e6:.0f}",
            ", ".join(sorted({run["device"] for run in chosen})),
        ]


def _rates(runs: Sequence[Record]) -> Iterator[str]:
    yield "Validation cost of the first seed by rate (the metric with its sign turned, or the loss); stopped: it diverged.\n"
    methods = dict.fromkeys(run["method"] for run in runs)
    first = {method: next(run["seed"] for run in runs if run["method"] == method) for method in methods}
    rows = [
        [method, f"{rate:g}", "stopped" if cost == float("inf") else f"{cost:.4f}"]
        for method in methods
        for rate, cost in sorted(costs(runs, method, first[method]).items())
    ]
    yield markdown(["method", "rate", "cost"], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{values[0]:.4f}" if len(values) < 2 else f"{mean(values):.4f} ± {stdev(values):.4f}"
