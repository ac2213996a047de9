"""The command line of configurations: what `run` and `report` of `python -m benchmarks.quality` do with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from roadie.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.quality.hub.sweep import Choice


def add_arguments(run: argparse.ArgumentParser) -> None:
    """What `run` takes beside --task, --records, --until and --threads."""
    of_configurations = run.add_argument_group("with a configuration (docs/quality-hub.md)")
    add = of_configurations.add_argument
    add("--config", type=Path, default=None, help="a YAML file: model, data, metric, methods")
    add("--method", action="append", default=[], metavar="NAME", help="only this method (may be given several times)")
    add("--seeds", type=int, default=None, metavar="N", help="the first N seeds of the configuration")
    add("--model", default=None, metavar="NAME", help="another model of the same kind, of the hub or in a folder")
    add("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    add("--dtype", default=None, choices=["float32", "bfloat16", "float16"], help="of the base model")
    add("--data", type=Path, default=Path(), metavar="FOLDER", help="where the paths of data files begin")
    add("--check", action="store_true", help="check the configuration, say what it would run, and stop")


def is_meant(options: argparse.Namespace) -> bool:
    """Whether `run` was given anything that only a configuration has."""
    given = (options.config, options.method, options.seeds, options.model, options.dtype, options.check)
    return any(given) or options.device != "cpu" or options.data != Path()


def run(options: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Train what the records lack of a configuration, or say what that would be."""
    from benchmarks.quality.hub.sweep import Choice, records_folder, sweep

    if options.config is None:
        print("error: got options of configurations without one; wanted --config FILE too; add it", file=sys.stderr)
        return 2
    choice = Choice(
        tasks=options.task,
        methods=options.method,
        seeds=options.seeds,
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        data=options.data,
    )
    if options.check:
        return explained(lambda: print(described(options.config, choice)))
    folder = options.records or records_folder()
    return explained(lambda: print(f"{sweep(options.config, choice, folder, stop)} runs; records in {folder}"))


def report(folder: Path) -> int:
    """Print the report of a folder of records."""
    from benchmarks.quality.hub.report import text_of

    return explained(lambda: print(text_of(folder)))


def described(path: Path, choice: Choice) -> str:
    """The tasks of a configuration, a paragraph each; nothing is loaded."""
    from benchmarks.quality.hub.sweep import chosen_tasks

    lines: list[str] = []
    for name, task in chosen_tasks(path, choice).items():
        lines += [f"{name}: {task.title}", f"  {task.model.name}, {task.model.dtype}, on {choice.device}"]
        lines += [f"  {method}: {_rates(rates)}" for method, rates in task.methods.items()]
        lines += [f"  seeds {', '.join(map(str, task.seeds))}; tests {', '.join(task.tests)}"]
    return "\n".join(lines)


def _rates(rates: object) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) if isinstance(rates, tuple) else str(rates)


def explained(do: Callable[[], None]) -> int:
    """0, or 2 where something that the user gave cannot be used, which is then said in a line."""
    try:
        do()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
