"""`make test-fast` runs the core's tests, all of them that start no process and take no seconds: its list cannot rot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# What each part of the core is tested by; of those with many tests elsewhere the folder of their own name.
CORE = {
    "rotation": "tests/laws",
    "adapter": "tests/test_adapter.py",
    "checkpoint": "tests/test_checkpoint.py",
    "kernels": "tests/kernels",
    "bank": "tests/bank",
    "tuner": "tests/tuner",
    "PEFT's own": "tests/anchors",
}
STARTS_PROCESSES = {"subprocess", "multiprocessing", "Popen"}


def listed() -> list[Path]:
    """The places that `make test-fast` names, with its wildcard filled in."""
    places = re.search(r"^CORE := (.*)$", MAKEFILE, flags=re.MULTILINE)[1]
    patterns = re.sub(r"\$\(wildcard ([^)]*)\)", r"\1", places).split()
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def test_every_part_of_the_core_is_listed() -> None:
    assert set(CORE.values()) <= {path.relative_to(ROOT).as_posix() for path in listed()}
    assert set((ROOT / "tests").glob("test_*.py")) <= set(listed())


def test_what_is_marked_slow_is_left_out_and_the_mark_is_known() -> None:
    assert re.search(r'^test-fast:.*\n.*-m "not slow" \$\(CORE\)', MAKEFILE, flags=re.MULTILINE)
    options = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"slow: ' in options


def test_what_is_marked_long_is_left_out_by_default_and_runs_with_every_change() -> None:
    options = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"-m", "not long"' in options
    assert re.search(r"^test-long:.*\n.* -m long ", MAKEFILE, flags=re.MULTILINE)
    assert "part make test-long\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def found_in(path: Path) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """The tests of a file: where, what, and whether it is marked slow, itself or with its file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    everywhere = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    is_marked = any("mark.slow" in ast.unparse(node) for node in everywhere)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            own = any("mark.slow" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield f"{path.relative_to(ROOT)}::{node.name}", node, own or is_marked


def test_what_starts_a_process_is_marked_slow() -> None:
    files = [file for path in listed() for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
    found = [each for file in files for each in found_in(file)]
    assert len(found) > 500
    assert any(is_slow for _, _, is_slow in found)
    starting = {
        where
        for where, test, is_slow in found
        if not is_slow and STARTS_PROCESSES & {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    }
    assert starting == set()
