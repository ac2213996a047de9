"""Files do not import each other in a circle: whoever reads one can read what it stands on first.

Imports in functions and under TYPE_CHECKING count too, because a reader needs what they name all the same. The `__init__` of a
package is a file like any other: it is imported by whoever takes a name from it, not by whoever takes a module.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.architecture.imports import imports

SOURCES = Path(__file__).resolve().parents[2] / "src"

Graph = dict[str, frozenset[str]]


def graph_of(sources: Path) -> Graph:
    """Module -> the modules that it imports, for every file below `sources`."""
    files = {module_of(path.relative_to(sources)): path for path in sources.rglob("*.py")}
    graph = {}
    for module, path in files.items():
        named = (file_of(name, files) for _, name in imports(path.read_text(encoding="utf-8")))
        graph[module] = frozenset(name for name in named if name) - {module}
    return graph


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def file_of(name: str, files: dict[str, Path]) -> str:
    """The module that `name` is or is in; "" where it is none of ours."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def circles(graph: Graph) -> list[list[str]]:
    """The largest sets of two modules or more in which each can be reached from each."""
    reached = {module: reachable(module, graph) for module in graph}
    together = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(circle) for circle in together if len(circle) > 1)


def reachable(module: str, graph: Graph) -> set[str]:
    found: set[str] = set()
    waiting = set(graph[module])
    while waiting:
        found |= waiting
        waiting = set().union(*(graph[each] for each in waiting)) - found
    return found


def arrows(circle: list[str], graph: Graph) -> list[str]:
    return [f"{module} imports {other}" for module in circle for other in sorted(graph[module] & set(circle))]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(SOURCES)


def test_files_do_not_import_each_other_in_a_circle(graph: Graph) -> None:
    assert len(graph) > 250
    assert [arrows(circle, graph) for circle in circles(graph)] == []


@pytest.mark.parametrize(
    ("upper", "lower", "found"),
    [
        ("from pack.lower import name", "", []),
        ("from pack.lower import name", "from pack import __version__", []),
        ("from pack.lower import name", "import pack.upper", [["pack.lower", "pack.upper"]]),
        ("from pack.lower import name", "def f():\n    from pack.upper import name", [["pack.lower", "pack.upper"]]),
        (
            "from pack.lower import name",
            "if TYPE_CHECKING:\n    from pack import upper",
            [["pack.lower", "pack.upper"]],
        ),
        ("import_module('pack.lower')", "from pack.upper import name", [["pack.lower", "pack.upper"]]),
        ("from pack.lower import name", "from pack import facade", [["pack", "pack.lower", "pack.upper"]]),
    ],
)
def test_circles_are_seen(tmp_path: Path, upper: str, lower: str, found: list[list[str]]) -> None:
    """In a package whose `__init__` takes `facade` from the upper of two files, where that is asked for."""
    (tmp_path / "pack").mkdir()
    facade = "from pack.upper import facade" if "facade" in lower else ""
    for name, text in {"__init__": facade, "upper": upper, "lower": lower}.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    assert circles(graph_of(tmp_path)) == found


def test_two_circles_are_two() -> None:
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}
    assert circles({module: frozenset(imported) for module, imported in graph.items()}) == [["a", "b"], ["c", "d", "e"]]
