"""The steps of a whole model alone: those of `make bench --model FOLDER`, for whoever works on what they cost.

    python -m benchmarks.real_model --model FOLDER                 any checkpoint that transformers loads; 15 minutes on two cores
    python -m benchmarks.real_model --model FOLDER --rounds 5      the same steps, five rounds of each
    python -m benchmarks.real_model --model FOLDER --processor-time    those of one thread, on a machine that has other work
    python -m benchmarks.real_model --quick                        a tiny random Llama, seconds

Prints the section of docs/performance.md. The record goes to .cache/benchmarks, or where `--output` says; it holds no layers, and
the document is made of the records of `make bench` alone.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import plan, record, report, run, verdicts
from benchmarks.harness import Budget
from benchmarks.rivals import PRECISIONS
from benchmarks.workloads.real_model import Shapes, WholeCase


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a step failed."""
    options = _parse(arguments)
    # Quick, so that it goes elsewhere: however many rounds it has, it is no record of everything.
    made = record.rounded(run.measure_all(_tasks(options), quick=True, deadline_s=math.inf))
    made["processor_time"] = options.processor_time
    if options.processor_time:
        sys.stdout.write(
            "\nTimes are those that the processor spent in the one thread, not those of the clock on the wall.\n"
        )
    sys.stdout.write(f"\n{report.whole_models_section(made)}\n{report.verdict_table(verdicts.of_whole_models(made))}\n")
    sys.stdout.write(f"record: {record.write(made, options.output)}\n")
    return 1 if made["failures"] else 0


def _tasks(options: argparse.Namespace) -> Iterator[plan.Task]:
    if options.quick:
        return plan.quick_whole_models(options.checkpoint)
    precision = options.precision or "fp32"
    return plan.whole_models(options.checkpoint, precision, _shapes(options), functools.partial(_budget, options))


def _shapes(options: argparse.Namespace) -> Shapes:
    """All that `make bench` has, but for what the options leave out."""
    all_of = Shapes()
    most = options.most_tokens or max(all_of.training_tokens)
    return replace(
        all_of,
        threads=tuple(options.threads or ([1] if options.processor_time else all_of.threads)),
        training_tokens=tuple(tokens for tokens in all_of.training_tokens if tokens <= most),
        mixed_training=tuple((rows, tokens) for rows, tokens in all_of.mixed_training if rows * tokens <= most),
    )


def _budget(options: argparse.Namespace, case: WholeCase) -> Budget:
    budget = replace(plan.whole_budget(case), processor_time=options.processor_time)
    return replace(budget, seconds=0.0, min_rounds=options.rounds) if options.rounds else budget


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.partition("\n")[0])
    run.add_model(parser)
    parser.add_argument(
        "--quick", action="store_true", help="a few short steps of its own, to see that everything runs"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the base and of single adapters; fp32 if not given")
    parser.add_argument("--threads", type=int, nargs="+", help="how many threads steps run on; 1 and 2 if not given")
    parser.add_argument("--processor-time", action="store_true", help="not the clock on the wall; one thread alone")
    parser.add_argument("--rounds", type=int, help="so many rounds of each step, and no more")
    parser.add_argument("--most-tokens", type=int, help="no training steps of more")
    parser.add_argument("--output", type=Path, help="where the record goes instead")
    options = parser.parse_args(arguments)
    options.checkpoint = run.checkpoint_of(options, parser)
    of_full = ("precision", "threads", "processor_time", "rounds", "most_tokens")
    given = [f"--{name.replace('_', '-')}" for name in of_full if getattr(options, name)]
    if options.quick and given:
        parser.error(f"got --quick and {given[0]}; --quick has steps of its own; leave one of them out")
    if options.processor_time and options.threads not in (None, [1]):
        parser.error(
            f"got --processor-time and --threads {options.threads}; it counts one thread's time; use --threads 1"
        )
    if options.checkpoint is None and not options.quick:
        parser.error("got no checkpoint; give --model FOLDER, or --quick for a tiny random Llama")
    return options


if __name__ == "__main__":
    sys.exit(main())
