"""`python -m benchmarks.quality run | quick | report`."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.quality import records
from benchmarks.quality.hub import command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="train what the records lack")
    run.add_argument("--task", action="append", default=[], help="only this task (may be given several times)")
    run.add_argument("--records", type=Path, default=None, help="folder of the records")
    run.add_argument("--until", default=None, help="HH:MM in UTC: start no run after that")
    run.add_argument("--threads", type=int, default=1)
    command.add_arguments(run)
    verbs.add_parser("quick", help="repeat two rows of the records, and compare")
    report = verbs.add_parser("report", help="make docs/quality.md of the records")
    report.add_argument("--records", type=Path, default=None, help="print a report of what run --config wrote there")
    options = parser.parse_args(arguments)
    return VERBS[options.verb](options)


def _run(options: argparse.Namespace) -> int:
    from benchmarks.quality.sweep import sweep

    torch.set_num_threads(options.threads)
    if command.is_meant(options):
        return command.run(options, _stop_at(options.until))
    count = sweep(options.records or records.folder(), _stop_at(options.until), options.task)
    print(f"{count} runs")
    return 0


def _quick(_: argparse.Namespace) -> int:
    from benchmarks.quality.quick import repeat

    torch.set_num_threads(1)
    return repeat()


def _report(options: argparse.Namespace) -> int:
    from benchmarks.quality.report import main as report

    return report() if options.records is None else command.report(options.records)


def _stop_at(clock: str | None) -> Callable[[], bool]:
    """A question with the answer yes from that time of day (UTC) on; None: never."""
    if clock is None:
        return lambda: False
    hour, minute = (int(part) for part in clock.split(":"))
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now.replace(hour=hour, minute=minute, second=0)
    end += datetime.timedelta(days=end <= now)
    return lambda: datetime.datetime.now(datetime.timezone.utc) >= end


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"run": _run, "quick": _quick, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
