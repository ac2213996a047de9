"""The steps of a whole model alone: those of `make bench --model FOLDER`, for whoever works on what they cost.

    python -m benchmarks.real_model --model FOLDER                 any checkpoint that transformers loads; 15 minutes on two cores
    python -m benchmarks.real_model --model FOLDER --rounds 5      the same steps, five rounds of each
    python -m benchmarks.real_model --quick                        a tiny random Llama, seconds

Prints the section of docs/performance.md. The record goes to .cache/benchmarks, or where `--output` says; it holds no layers, and
the document is made of the records of `make bench` alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plan, record, report, run, verdicts
from benchmarks.harness import Budget
from benchmarks.rivals import PRECISIONS
from benchmarks.workloads.real_model import Shapes


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a step failed."""
    options = _parse(arguments)
    # Quick, so that it goes elsewhere: however many rounds it has, it is no record of everything.
    made = record.rounded(run.measure_all(_tasks(options), quick=True))
    sys.stdout.write(f"\n{report.whole_models_section(made)}\n{report.verdict_table(verdicts.of_whole_models(made))}\n")
    sys.stdout.write(f"record: {record.write(made, options.output)}\n")
    return 1 if made["failures"] else 0


def _tasks(options: argparse.Namespace) -> Iterator[plan.Task]:
    if options.quick:
        return plan.quick_whole_models(options.checkpoint)
    exactly = options.rounds and Budget(0.0, options.rounds, options.rounds)
    shapes = Shapes(threads=tuple(options.threads))
    return plan.whole_models(
        options.checkpoint, options.precision, shapes, lambda case: exactly or plan.whole_budget(case)
    )


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.partition("\n")[0])
    run.add_model(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the base, and of a single adapter")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="how many threads steps run on")
    parser.add_argument("--rounds", type=int, help="so many rounds of each step, and no more")
    parser.add_argument("--quick", action="store_true", help="a few short steps, to see that everything runs")
    parser.add_argument("--output", type=Path, help="where the record goes instead")
    options = parser.parse_args(arguments)
    options.checkpoint = run.checkpoint_of(options, parser)
    if options.checkpoint is None and not options.quick:
        parser.error("got no checkpoint; give --model FOLDER, or --quick for a tiny random Llama")
    return options


if __name__ == "__main__":
    sys.exit(main())
