"""Run the benchmarks, write the record, and make docs/performance.md from it.

python -m benchmarks.run              everything; at most 15 minutes on two cores
python -m benchmarks.run --quick      about a minute; record and document go to .cache/benchmarks
python -m benchmarks.run --report     no measuring: the document anew from the newest record

`--model FOLDER`, or ROADIE_BENCH_MODEL, is a checkpoint that transformers loads: its steps are measured too, in 15 minutes more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import plan, record, report
from benchmarks.machine import commit, describe, now
from benchmarks.workloads import with_limit
from benchmarks.workloads.real_model import Checkpoint, Shapes


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a case failed."""
    options = _parse(arguments)
    if not options.report:
        made = measure_everything(options.checkpoint, options.quick)
        _say(f"\n{report.text_of(made, None)}\nrecord: {record.write(made)}")
        if made["failures"]:
            _say("a case failed: the document is left as it was")
            return 1
        if options.quick:
            _say(f"document: {report.write(made, None, record.QUICK)}")
            return 0
    return write_document()


def write_document() -> int:
    """docs/performance.md and its plots from the newest records; 1 where there is no record."""
    newest = record.newest(record.CPU)
    if newest is None:
        _say(f"there is no record in {record.RESULTS}; run `make bench` first")
        return 1
    _say(f"document: {report.write(newest, record.newest(record.GPU), report.DOCS)}")
    return 0


def measure_everything(checkpoint: Checkpoint | None, quick: bool) -> dict[str, Any]:
    """The record of whole models and of all the rest; its "duration_s" is that of the rest."""
    if checkpoint is None and not quick:
        _say("no checkpoint was given, so that no real model is measured; --model FOLDER gives one")
    if quick:
        whole, rest = plan.quick_whole_models(checkpoint), plan.quick()
    else:
        whole, rest = plan.whole_models(checkpoint, "fp32", Shapes(), plan.whole_budget), plan.full()
    of_whole = measure_all(whole, quick, plan.WHOLE_DEADLINE_S)
    return {**measure_all(rest, quick, begun=of_whole), "whole_models_s": of_whole["duration_s"]}


def measure_all(
    tasks: Iterable[plan.Task],
    quick: bool,
    deadline_s: float = plan.DEADLINE_S,
    begun: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of running all tasks, one after the other; one that raises is in "failures", the others go on.

    Tasks that have not begun after `deadline_s` are not run, and named in "left_out". begun: a record to go on with.
    """
    start = time.perf_counter()
    result = begun or record.start(record.CPU, describe(), now(), commit(), quick)
    speeds = result["machine"]["copy_bytes_per_s"]
    failures: list[dict[str, str]] = list(result.get("failures", ()))
    left_out: list[str] = list(result.get("left_out", ()))
    for task in tasks:
        began = time.perf_counter()
        if began - start > deadline_s:
            left_out.append(task.title)
            continue
        try:
            torch.manual_seed(0)
            result["entries"] += [with_limit(entry, speeds) for entry in task.run()]
        except Exception as error:  # the record says so, the exit code too
            traceback.print_exc()
            failures.append({"task": task.title, "error": f"{type(error).__name__}: {error}"})
        _say(f"{time.perf_counter() - start:6.1f} s  {time.perf_counter() - began:5.1f} s  {task.title}")
    load = [round(value, 2) for value in os.getloadavg()]
    end = {"load_average_end": load, "duration_s": time.perf_counter() - start}
    return {**result, **end, "failures": failures, "left_out": left_out}


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; docs/ stays as it is")
    parser.add_argument("--report", action="store_true", help="make the document from the newest record")
    add_model(parser)
    options = parser.parse_args(arguments)
    options.checkpoint = checkpoint_of(options, parser)
    return options


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which checkpoint is measured."""
    default = os.environ.get("ROADIE_BENCH_MODEL")
    parser.add_argument("--model", metavar="FOLDER", default=default, help="a checkpoint that transformers loads")
    parser.add_argument("--model-name", metavar="NAME", help="what the record calls it; its folder's name if not given")


def checkpoint_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Checkpoint | None:
    """The checkpoint that the options name; ends the program where that is no folder with a model."""
    if not options.model:
        return None
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        parser.error(
            f"got --model {folder}; wanted a folder with config.json and weights, as save_pretrained writes it"
        )
    return Checkpoint(options.model_name or folder.absolute().name, folder)


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
