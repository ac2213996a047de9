"""Starts the processes of each step, within its time; without torch, so that nothing that is broken there stops it.

A process that ends before its cases are done is followed by another for the rest, as long as that gets further. Whatever happens,
what was done is in the journal.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.journal import BEGAN, ENDED, STOPPED, Journal
from benchmarks.gpu.plan import Step, most_s

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 5.0  # with less left a step is not begun
POLL_S = 0.1
Command = Callable[[Step, int, float], Sequence[str]]
"""What does the cases of a shard: of a step, its number, and within how many seconds."""


def run(steps: Sequence[Step], journal: Journal, until: float, command: Command, environment: dict[str, str]) -> None:
    """All steps, one after the other, each until it is done or its time is over, the last by `until` (`time.monotonic`)."""
    seconds = until - time.monotonic()
    for step in steps:
        left = until - time.monotonic()
        if left < LEAST_S:
            say(f"{step.name}: left out, the time is over")
            continue
        began = time.monotonic()
        is_done = run_step(step, journal, began + min(left, most_s(step, steps, seconds)), command, environment)
        say(f"{step.name}: {_counted(step, journal)}{'' if is_done else ', ended'} in {time.monotonic() - began:.0f} s")


def run_step(step: Step, journal: Journal, until: float, command: Command, environment: dict[str, str]) -> bool:
    """Whether every process of a step came to its end before `until`, when those that have not are killed."""
    with (journal.path.parent / "log.txt").open("ab") as log:
        shards = [_Shard(step, index, journal, command, environment, log) for index in range(step.shards)]
        with _ended(shards):
            while any([shard.goes_on(until) for shard in shards]):  # noqa: C419 - each is looked after, every time
                if time.monotonic() > until:
                    break
                time.sleep(POLL_S)
            else:
                return True
    for line in journal.unended():
        journal.put(STOPPED, step=line["step"], by=line["by"], case=line["case"])
    return False


class _Shard:
    """The process that does a shard, and those that follow it."""

    def __init__(
        self, step: Step, index: int, journal: Journal, command: Command, environment: dict[str, str], log: object
    ) -> None:
        self._step, self._index, self._journal = step, index, journal
        self._command, self._environment, self._log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None
        self._known = 0
        self._is_done = False

    def goes_on(self, until: float) -> bool:
        """Start a process where there is none, and see whether it has ended; whether there is anything left to wait for."""
        if not self._is_done and self._process is None:
            self._start(until)
        if self._process is not None and self._process.poll() is not None:
            self._after(self._process.returncode)
            self._process = None
        return not self._is_done

    def _start(self, until: float) -> None:
        self._known = self._lines()
        command = self._command(self._step, self._index, until - time.monotonic())
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def _after(self, code: int) -> None:
        """Done where it says so; else another is to follow, unless this one got nowhere."""
        self._is_done = code == 0
        if code and self._lines() == self._known:
            why = f"a process ended with {code} before it did anything; log.txt has its last words"
            self._journal.put(ENDED, step=self._step.name, by=self._name, case=f"process {self._name}", error=why)
            self._is_done = True

    @property
    def _name(self) -> str:
        return f"{self._step.name}/{self._index}"

    def _lines(self) -> int:
        """How many cases of this shard began or ended."""
        return sum(line["by"] == self._name for line in self._journal.lines(BEGAN, ENDED))

    def kill(self) -> None:
        """End the process and all that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def _ended(shards: Sequence[_Shard]) -> Iterator[None]:
    """No process outlives the block."""
    try:
        yield
    finally:
        for shard in shards:
            shard.kill()


def _counted(step: Step, journal: Journal) -> str:
    ended = [line for line in journal.lines(ENDED) if line["step"] == step.name]
    failed = {line["case"]: line["error"] for line in ended if "error" in line}
    for case, error in failed.items():
        say(f"  failed: {case}: {error}")
    return f"{len({line['case'] for line in ended})} cases, {len(failed)} failed"


def environment(device: str, wheels: Path, site: Path) -> dict[str, str]:
    """For the processes: no installation, no network, Triton compiled or interpreted, and wheels that are newer first."""
    found = [str(site)] if unpack_newer(wheels, site) else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*found, str(ROOT / "src"), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": str(int(device == "cpu")),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # side by side; what is timed is the device
    }


def unpack_newer(wheels: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that are missing here, or older, into `site`; gives their names. pip is not needed."""
    unpacked = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, own = wheel.name.split("-")[:2]
        if _is_older(name, own):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            say(f"{name} {own} from {wheel}")
            unpacked.append(name)
    return unpacked


def _is_older(name: str, wanted: str) -> bool:
    """Whether the installed package is older than `wanted`, or missing."""
    try:
        return _numbers(version(name)) < _numbers(wanted)
    except PackageNotFoundError:
        return True


def _numbers(release: str) -> tuple[int, ...]:
    """The release of a version: 0.21.2.dev0 is 0.21.2."""
    found = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in found.group().split(".")) if found else ()


def say(text: object) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
