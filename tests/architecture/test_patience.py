"""No test fails because a machine is slow: none ends a wait before `HANG_S`, and none says how long something may take."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CLOCKS = {"monotonic", "perf_counter", "time", "process_time"}
WAITS = {"acquire", "communicate", "drain", "join", "result", "wait"}
PAUSE_S = 1.0  # shorter waits only pass the time
PATIENT = {"HANG_S", "give_up_s"}


def impatience(code: str) -> list[int]:
    """The lines that wait for a number of seconds of their own, or assert that less than some time has gone by."""
    return sorted({node.lineno for node in ast.walk(ast.parse(code)) if _waits(node) or _measures(node)})


def _waits(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    limits = [word.value for word in node.keywords if word.arg in ("timeout", "timeout_s")]
    if isinstance(node.func, ast.Attribute) and node.func.attr in WAITS and len(node.args) == 1:
        limits += node.args
    numbers = [limit.value for limit in limits if isinstance(limit, ast.Constant)]
    return any(isinstance(number, (int, float)) and number >= PAUSE_S for number in numbers)


def _measures(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assert):
        return False
    bounds = [each for each in ast.walk(node.test) if isinstance(each, ast.Compare) and _is_upper(each)]
    return any(_reads_a_clock(bound) and not PATIENT & _names(bound) for bound in bounds)


def _is_upper(compare: ast.Compare) -> bool:
    return any(isinstance(operator, (ast.Lt, ast.LtE)) for operator in compare.ops)


def _reads_a_clock(tree: ast.AST) -> bool:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(call, ast.Attribute) and call.attr in CLOCKS for call in calls)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize(
    ("code", "is_impatient"),
    [
        ("subprocess.run(command, timeout=60)", True),
        ("subprocess.run(command, timeout=HANG_S)", False),
        ("thread.join(30)", True),
        ("stop.wait(0.004)", False),
        ("assert time.monotonic() - begin_s < 5", True),
        ("assert time.monotonic() < give_up_s", False),
        ("assert time.monotonic() - begin_s >= 0.3", False),
    ],
)
def test_what_is_impatient(code: str, is_impatient: bool) -> None:
    assert bool(impatience(code)) is is_impatient


def test_no_test_is() -> None:
    paths = [path for path in TESTS.rglob("*.py") if path.name != Path(__file__).name]
    found = {str(path.relative_to(TESTS)): impatience(path.read_text(encoding="utf-8")) for path in paths}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}
