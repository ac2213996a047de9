"""Arrows point down: a module imports only from lower rungs and its own package.

The rungs, and what each may import besides the standard library, are read from the table in ARCHITECTURE.md, so that the
document cannot say one thing and the code do another.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.architecture.imports import imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "roadie"
LONGEST_MODULE, LONGEST_FUNCTION = 500, 60


@dataclass(frozen=True)
class Rung:
    height: str
    libraries: frozenset[str]


def read_ladder(text: str) -> dict[str, Rung]:
    """`| rung | `module` | `library`, `library` | ... |` -> module: Rung."""
    ladder = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) >= 3 and re.fullmatch(r"\d[a-z]?", cells[0]):
            for module in re.findall(r"`(\w+)`", cells[1]):
                ladder[module] = Rung(cells[0], frozenset(re.findall(r"`(\w+)`", cells[2])))
    return ladder


def fault_of(module: str, imported: str, ladder: dict[str, Rung]) -> str | None:
    """Why `module` (a file or folder of src/roadie) must not import `imported`; None where it may."""
    rung = ladder[module]
    first, *rest = imported.split(".")
    if first in ("", "<computed>"):
        return "relative or computed import"
    if imported.startswith("peft.tuners.road"):
        return "PEFT's own RoAd"
    if first != "roadie":
        return (
            None
            if first in rung.libraries or first in sys.stdlib_module_names
            else f"a library not of rung {rung.height}"
        )
    if rest[:1] == [module]:
        return None
    if not rest or rest[0] not in ladder:
        return "the lazy names of roadie: import from the module that defines them"
    return None if ladder[rest[0]].height < rung.height else f"rung {ladder[rest[0]].height} from rung {rung.height}"


def faults(package: Path, ladder: dict[str, Rung]) -> list[str]:
    """`file:line imports name: why` for every import that does not point down."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        lazy = path.name == "__init__.py"  # a package may look its own names up lazily; TYPE_CHECKING shows which
        for line, imported in imports(path.read_text(encoding="utf-8")):
            why = None if lazy and imported == "<computed>" else fault_of(module, imported, ladder)
            if why:
                found.append(f"{path.relative_to(package)}:{line} imports {imported}: {why}")
    return found


@pytest.fixture(scope="module")
def ladder() -> dict[str, Rung]:
    return read_ladder((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def test_imports_point_down(ladder: dict[str, Rung]) -> None:
    assert faults(PACKAGE, ladder) == []


def test_every_module_has_a_rung(ladder: dict[str, Rung]) -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(ladder) == files | folders


@pytest.mark.parametrize(
    ("module", "line", "why"),
    [
        ("rotation", "from roadie.adapter import Adapter", "rung 2 from rung 1"),
        ("rotation", "from roadie.cousin import thing", "rung 1 from rung 1"),
        ("rotation", "def f():\n    import roadie.adapter", "rung 2 from rung 1"),
        ("rotation", "if TYPE_CHECKING:\n    from roadie import adapter", "rung 2 from rung 1"),
        ("rotation", "import_module('roadie.adapter')", "rung 2 from rung 1"),
        ("rotation", "importlib.import_module(name)", "relative or computed import"),
        ("rotation", "from .adapter import Adapter", "relative or computed import"),
        ("rotation", "import peft", "a library not of rung 1"),
        ("adapter", "from roadie import Rotation", "the lazy names of roadie"),
        ("adapter", "from roadie import __version__", "the lazy names of roadie"),
        ("adapter", "import roadie", "the lazy names of roadie"),
        ("adapter", "from peft.tuners.road import RoadLayer", "PEFT's own RoAd"),
        ("adapter", "import peft.tuners.road.layer", "PEFT's own RoAd"),
    ],
)
def test_the_reader_sees_imports_that_point_up(tmp_path: Path, module: str, line: str, why: str) -> None:
    (tmp_path / f"{module}.py").write_text(line)
    rungs = {"rotation": Rung("1", frozenset({"torch"})), "cousin": Rung("1", frozenset())}
    found = faults(tmp_path, rungs | {"adapter": Rung("2", frozenset({"torch", "peft"}))})
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    "line",
    [
        "import torch.nn",
        "import os",
        "from roadie.rotation import rotate",
        "from roadie import rotation",
        "import peft.utils",
        "from roadie.adapter.part import thing",
    ],
)
def test_the_reader_allows_imports_that_point_down(tmp_path: Path, line: str) -> None:
    (tmp_path / "adapter.py").write_text(line)
    rungs = {"rotation": Rung("1", frozenset()), "adapter": Rung("2", frozenset({"torch", "peft"}))}
    assert faults(tmp_path, rungs) == []


def test_no_module_is_too_long_to_read() -> None:
    sizes = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("src", "scripts", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sizes
    assert {path: lines for path, lines in sizes.items() if lines > LONGEST_MODULE} == {}


@pytest.mark.parametrize("package", ["bank", "experts", "kernels", "sites", "tuner", "vllm"])
def test_no_function_of_the_core_is_too_long_to_read(package: str) -> None:
    """Triton's kernels are counted from their first statement on: each of their many parameters has a line of its own."""
    found = {
        f"{path.name}:{node.lineno} {node.name}": node.end_lineno
        - (node.body[0] if is_kernel(node) else node).lineno
        + 1
        for path in (PACKAGE / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert found
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
