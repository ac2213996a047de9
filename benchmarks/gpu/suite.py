"""A part of the project's tests in this process, each of them in the journal as soon as it has ended."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu.journal import BEGAN, ENDED, Journal

HANG_S = 90.0  # of one test; an example compiles a kernel in a second or two


class Part:
    """A plugin of pytest: every `count`-th test, but those that the journal has; stops where the device is lost.

    hang_s: after so many seconds in one test the process ends itself.
    """

    def __init__(
        self,
        journal: Journal,
        step: str,
        by: str,
        index: int,
        count: int,
        hang_s: float,
        is_lost: Callable[[], bool],
    ) -> None:
        self._journal, self._step, self._by = journal, step, by
        self._index, self._count, self._hang_s, self._is_lost = index, count, hang_s, is_lost
        self._error: str | None = None
        self._outcome = ""
        self._seconds = 0.0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out what is another part's, or done."""
        seen = self._journal.seen(self._step)
        left = [item for item in items[self._index :: self._count] if item.nodeid not in seen]
        items[:] = sorted(left, key=lambda item: hasattr(item.obj, "hypothesis"))  # many examples, many kernels: last

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be read, or is skipped as a whole; all parts say so, and it counts once."""
        ended = {"step": self._step, "by": self._by, "case": report.nodeid}
        if report.failed:
            self._journal.put(ENDED, **ended, error=_why(report))
        if report.skipped:
            self._journal.put(ENDED, **ended, entries=[{"workload": "tests", "outcome": report.outcome}])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._error, self._outcome, self._seconds = None, "passed", 0.0
        self._journal.put(BEGAN, step=self._step, by=self._by, case=nodeid)
        faulthandler.dump_traceback_later(HANG_S, exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of it has ended: setting up, the test, tearing down."""
        self._seconds += report.duration
        if report.outcome != "passed":
            self._outcome = report.outcome
        if report.failed:
            self._error = _why(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """All of it has ended."""
        faulthandler.cancel_dump_traceback_later()
        ended = {"step": self._step, "by": self._by, "case": nodeid, "seconds": round(self._seconds, 3)}
        if self._error is None:
            self._journal.put(ENDED, **ended, entries=[{"workload": "tests", "outcome": self._outcome}])
        else:
            self._journal.put(ENDED, **ended, error=self._error)
            if self._is_lost():
                pytest.exit("the device is lost to this process")


def _why(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message)[:500] if crash is not None else str(report.longrepr)[-500:]


def run(part: Part, paths: tuple[str, ...]) -> bool:
    """Whether all tests of a part ran, right or wrong."""
    plain = [argument for name in ("cacheprovider", "faulthandler", "xdist") for argument in ("-p", f"no:{name}")]
    code = pytest.main([*paths, "-q", "--continue-on-collection-errors", *plain], plugins=[part])
    return code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
