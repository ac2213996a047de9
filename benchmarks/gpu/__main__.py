"""The benchmark of a GPU, within a limit of time: checks, times, and a record of whatever was done.

    make gpu                                          on the machine: no installation, no network, no git
    make gpu ARGS=--tiny                              the same code at toy sizes on a CPU
    make gpu ARGS="--folder FOLDER --limit-s 300"     another folder and limit; goes on where a run in this folder stopped
    python -m benchmarks.gpu --budget                 how long each step should take
    python -m benchmarks.gpu --keep FOLDER            afterwards, in a checkout: a record of what a run left, killed or not

FOLDER has three files: journal.jsonl, log.txt, and at the end record.json. `python -m benchmarks.run --report` takes the newest
record of benchmarks/results into docs/performance.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import driver, plan
from benchmarks.gpu.driver import say
from benchmarks.gpu.journal import RUN, Journal
from benchmarks.gpu.plan import Step


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a case failed."""
    options = _parse(arguments)
    if options.budget:
        return _budget(options.tiny)
    if options.keep:
        return _assemble(options.keep, None)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    until = time.monotonic() + options.limit_s - plan.ASSEMBLING_S
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    folder = options.folder or driver.ROOT / ".cache" / "gpu" / now.replace(":", "")
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    if not journal.lines(RUN):
        journal.put(
            RUN, tiny=options.tiny, device=options.device, date=now, commit=options.commit, limit_s=options.limit_s
        )
    say(f"folder: {folder}")

    def command(step: Step, index: int, seconds: float) -> list[str]:
        flags = ["--folder", str(folder), "--seconds", f"{seconds:.0f}", "--device", options.device]
        flags += ["--tiny"] * options.tiny
        return [sys.executable, "-m", "benchmarks.gpu.worker", step.name, str(index), *flags]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which leaves a record, too
    with tempfile.TemporaryDirectory() as site:
        environment = driver.environment(options.device, options.wheels, Path(site))
        try:
            driver.run(plan.steps(options.tiny), journal, until, command, environment)
        finally:
            sys.path[:0] = environment["PYTHONPATH"].split(":")  # for what makes the record
            code = _assemble(folder, folder / "record.json")
    return code


def _assemble(folder: Path, path: Path | None) -> int:
    from benchmarks import record
    from benchmarks.gpu.assembled import assembled

    made = assembled(Journal(folder))
    say(f"record: {record.write(made, path)}, {len(made['entries'])} entries")
    for title in made["left_out"]:
        say(f"  left out: {title}")
    return 1 if made["failures"] else 0


def _budget(tiny: bool) -> int:
    seconds = plan.budget(tiny)
    for step in plan.steps(tiny):
        side_by_side = f", {step.shards} processes" if step.shards > 1 else ""
        say(f"{seconds[step.name]:6.0f} s  {step.name}: {len(step.cases)} cases{side_by_side}")
    say(f"{seconds['assembling']:6.0f} s  assembling\n{sum(seconds.values()):6.0f} s  together")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU unless --device cuda says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--limit-s", type=float, default=plan.LIMIT_S, help="seconds for all of it")
    parser.add_argument("--folder", type=Path, help="where journal, log and record go")
    parser.add_argument("--wheels", type=Path, default=driver.ROOT / "wheels", help="of packages that may be missing")
    parser.add_argument("--commit", help="what the checkout is, where there is no git to ask")
    parser.add_argument("--budget", action="store_true", help="how long it should take, and nothing else")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="make a record of what a run left, and nothing else"
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.device == "cpu" and not options.tiny:
        parser.error("got --device cpu without --tiny; these shapes take hours on a CPU; add --tiny")
    if options.folder is not None:
        options.folder = options.folder.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
