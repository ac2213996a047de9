"""One process of a step: its cases one after the other, each in the journal as soon as it has ended.

    python -m benchmarks.gpu.worker STEP INDEX --folder FOLDER --seconds 60 [--tiny] [--device cpu]

A case that raises is written down and the next one begins. After an error that takes the device from a process (an illegal
address, say) this one ends with `LOST`, and whoever started it starts another for what is left; so it does after a crash, or
where a case gives no answer for too long and the process ends itself.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import BEGAN, ENDED, Journal
from benchmarks.gpu.plan import REAL, TOY, Case, steps
from benchmarks.gpu.setting import Entry, Setting

LOST = 75
HANG_S = 30.0  # a case hangs that takes longer than this, and than half of the time for all of them
_MODULES = {
    **dict.fromkeys(("rotation", "prepared", "gradients", "product"), "benchmarks.gpu.smoke"),
    **dict.fromkeys(("machine", "copying", "layer", "decoding", "training"), "benchmarks.gpu.timed"),
}
Call = Callable[[Case], list[Entry]]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parse(arguments)
    _end_with_parent()
    journal, by = Journal(options.folder), f"{options.step}/{options.index}"
    journal.bury(by)
    until = time.monotonic() + options.seconds
    (step,) = (step for step in steps(options.tiny) if step.name == options.step)
    setting = Setting(options.device, (TOY if options.tiny else REAL).sizes)
    is_lost = _is_lost if options.device == "cuda" else lambda: False
    cases = step.shard(options.index)
    if options.step == "tests":
        return _tests(journal, by, cases, max(HANG_S, options.seconds / 2), is_lost)
    return work(journal, step.name, by, cases, until, lambda case: call(setting, case), is_lost)


def work(
    journal: Journal,
    step: str,
    by: str,
    cases: tuple[Case, ...],
    until: float,
    call: Call,
    is_lost: Callable[[], bool],
) -> int:
    """Do what the journal does not have yet, and what fits before `until` (of `time.monotonic`); gives the exit code."""
    seen, hang_s = journal.seen(step), max(HANG_S, (until - time.monotonic()) / 2)
    for case in cases:
        if case.title in seen or time.monotonic() + case.seconds > until:
            continue
        journal.put(BEGAN, step=step, by=by, case=case.title)
        faulthandler.dump_traceback_later(hang_s, exit=True)
        began = time.monotonic()
        try:
            done: dict[str, Any] = {"entries": call(case)}
        except Exception as error:  # the journal says so
            traceback.print_exc()
            done = {"error": f"{type(error).__name__}: {error}"[:500]}
        faulthandler.cancel_dump_traceback_later()
        journal.put(ENDED, step=step, by=by, case=case.title, seconds=round(time.monotonic() - began, 3), **done)
        gc.collect()
        if "error" in done and is_lost():
            return LOST
    return 0


def call(setting: Setting, case: Case) -> list[Entry]:
    """Do one case; what it needs is imported here, so that a library that is missing fails the cases that need it."""
    import torch

    torch.manual_seed(0)
    made: list[Entry] = getattr(import_module(_MODULES[case.kind]), case.kind)(setting, **case.arguments)
    return made


def _tests(journal: Journal, by: str, cases: tuple[Case, ...], hang_s: float, is_lost: Callable[[], bool]) -> int:
    from benchmarks.gpu import suite

    for case in cases:
        index, count, paths = (case.arguments[key] for key in ("index", "count", "paths"))
        if not suite.run(suite.Part(journal, "tests", by, index, count, hang_s, is_lost), paths):
            return LOST
        journal.put(ENDED, step="tests", by=by, case=case.title, entries=[])
    return 0


def _is_lost() -> bool:
    """Whether the device answers this process no more."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _end_with_parent() -> None:
    """No process goes on alone where the one that started it was killed; Linux has a signal for that."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("step")
    parser.add_argument("index", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
