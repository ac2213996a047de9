"""Run the benchmarks, write the record, and make docs/performance.md from it.

python -m benchmarks.run              everything; at most 15 minutes on two cores
python -m benchmarks.run --quick      about a minute; record and document go to .cache/benchmarks
python -m benchmarks.run --report     no measuring: the document anew from the newest record
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import plan, record, report
from benchmarks.machine import commit, describe, now
from benchmarks.workloads import with_limit


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a case failed."""
    options = _parse(arguments)
    if not options.report:
        made = measure_all(plan.quick() if options.quick else plan.full(), quick=options.quick)
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


def measure_all(tasks: Iterable[plan.Task], quick: bool, deadline_s: float = plan.DEADLINE_S) -> dict[str, Any]:
    """The record of running all tasks, one after the other; one that raises is in "failures", the others go on.

    Tasks that have not begun after `deadline_s` are not run, and named in "left_out".
    """
    start = time.perf_counter()
    result = record.start(record.CPU, describe(), now(), commit(), quick)
    speeds = result["machine"]["copy_bytes_per_s"]
    failures: list[dict[str, str]] = []
    left_out: list[str] = []
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
    return parser.parse_args(arguments)


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
