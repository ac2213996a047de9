"""The record of a run, out of its journal: of one that was killed as well, which then says what it left out."""

from __future__ import annotations

from typing import Any

from benchmarks import record
from benchmarks.gpu.journal import BEGAN, DIED, ENDED, RUN, STOPPED, Journal, Line
from benchmarks.gpu.plan import steps
from benchmarks.gpu.setting import Entry

KERNEL_S = 2e-6  # what a kernel costs however little it does: the gap to the next one
ABOVE_LIMIT = 1.3  # what roadie may cost above the base: so many times what bytes and kernels must


def assembled(journal: Journal) -> dict[str, Any]:
    """Entries with their bounds, failures, and what was left out; raises ValueError where not even the machine is known."""
    runs, ended = journal.lines(RUN), {_title(line): line for line in journal.lines(ENDED)}
    entries = [entry for line in ended.values() for entry in line.get("entries", ())]
    of_machine = [entry for entry in entries if entry["workload"] == "machine"]
    speeds = [entry["bytes_per_s"] for entry in entries if entry["workload"] == "copying"]
    if not runs or not of_machine or not speeds:
        raise ValueError(
            f"got {journal.path} with {len(ended)} cases; wanted those about the machine, which are the first; run it again"
        )
    told, machine = runs[0], {**of_machine[0]["machine"], "device_copy_bytes_per_s": speeds[0]}
    # Where there is no git, it is what whoever started the run said.
    of_checkout = {"commit": told["commit"], "dirty": False} if told["commit"] else of_machine[0]["commit"]
    made = record.start(record.GPU, machine, told["date"], of_checkout, told["tiny"])
    made["entries"] = [_with_bound(entry, speeds[0]) for entry in entries if "rivals" in entry]
    failed = [*(line for line in ended.values() if "error" in line), *journal.unended()]
    failures = [{"task": _title(line), "error": line.get("error", DIED)} for line in failed]
    checks = {
        name: _checked([line for line in ended.values() if line["step"] == name]) for name in ("kernels", "tests")
    }
    return {**made, "failures": failures, "left_out": _left_out(journal, told["tiny"]), "checks": checks}


def _with_bound(entry: Entry, bytes_per_s: float) -> Entry:
    """The entry with the base's time and what bytes and kernels must cost, and with what they may cost."""
    base_ms = entry["rivals"][entry["base"]]["median_ms"]
    above_ms = 1e3 * (entry["bytes_moved"] / bytes_per_s + entry["kernels"] * KERNEL_S)
    return {**entry, "limit_ms": base_ms + above_ms, "bound_ms": base_ms + ABOVE_LIMIT * above_ms}


def _checked(of_step: list[Line]) -> dict[str, Any]:
    """How many cases of a step passed, failed and were skipped, and the largest error as a multiple of its bound."""
    of_step = [line for line in of_step if line.get("entries") or "error" in line]  # without the ends of whole parts
    entries = [entry for line in of_step for entry in line.get("entries", ())]
    skipped = sum(entry.get("outcome") == "skipped" for entry in entries)
    failed = sum("error" in line for line in of_step)
    worst = max((error for entry in entries for error in entry.get("worst", {}).values()), default=None)
    counts = {"passed": len(of_step) - failed - skipped, "failed": failed, "skipped": skipped}
    return counts if worst is None else {**counts, "largest_error_in_bounds": worst}


def _left_out(journal: Journal, tiny: bool) -> list[str]:
    """What was planned and not begun, and what was going on when its step's time was over."""
    begun = {_title(line) for line in journal.lines(BEGAN, ENDED)}
    planned = [f"{step.name}: {case.title}" for step in steps(tiny) for case in step.cases]
    return [_title(line) for line in journal.lines(STOPPED)] + [title for title in planned if title not in begun]


def _title(line: Line) -> str:
    return f"{line['step']}: {line['case']}"
