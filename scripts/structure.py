"""What each module of the package is, in the first line of its docstring, a package after the other.

    python scripts/structure.py              all of them
    python scripts/structure.py tuner fit    those of some packages

Needs nothing but Python.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "roadie"


def main(wanted: list[str]) -> None:
    """Print the modules of the packages `wanted`; of all without any."""
    found = [path for path in sorted(PACKAGE.rglob("*.py"), key=_place) if not wanted or _top(path) in wanted]
    unknown = set(wanted) - {_top(path) for path in found}
    if unknown:
        raise SystemExit(
            f"got {', '.join(sorted(unknown))}; wanted packages or modules of {PACKAGE}, such as tuner or rotation"
        )
    print("\n".join(structure(found)))


def structure(paths: list[Path]) -> Iterator[str]:
    """A line a module, `name  first line`, below a line for its folder."""
    for folder, modules in groupby(paths, key=lambda path: path.parent):
        yield f"\n{folder.relative_to(PACKAGE.parent).as_posix()}/"
        yield from (f"  {path.name:24} {first_line(path)}" for path in modules)


def first_line(path: Path) -> str:
    """The first line of a module's docstring; "" where there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.partition("\n")[0] if docstring else ""


def _top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _place(path: Path) -> tuple[tuple[str, ...], bool, str]:
    """Folder by folder, each with its `__init__` first."""
    return path.relative_to(PACKAGE).parent.parts, path.name != "__init__.py", path.name


if __name__ == "__main__":
    main(sys.argv[1:])
