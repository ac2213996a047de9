"""The compiled kernel built again: for each instruction set alone, plainly, and with mistakes planted in its source."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from roadie.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "roadie" / "kernels" / "cpu"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def setup_script() -> dict[str, Any]:
    """What setup.py defines, without setting anything up."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def build(folder: Path, *flags: str, sources: Path = SOURCES) -> Path:
    """An object with one set of loops, compiled with setup.py's flags and those given; without OpenMP."""
    target = folder / "_rotate.so"
    command = [COMPILER, *setup_script()["GNU"], *flags, "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    files = [str(sources / "spans.c"), str(sources / "rotate.c")]
    subprocess.run([*command, "-DROADIE_SET=spans_default", *files, "-o", str(target)], check=True, capture_output=True)
    return target


def build_changed(folder: Path, name: str, before: str, after: str) -> Path:
    """An object from a copy of the sources in which `before`, wherever it stands in the file `name`, is `after`."""
    sources = folder / "sources"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    text = (sources / name).read_text(encoding="utf-8")
    assert before in text, f"{before!r} is not in {name}: the mistake has to be planted elsewhere"
    (sources / name).write_text(text.replace(before, after), encoding="utf-8")
    return build(folder, "-O0", sources=sources)  # in a sixth of the time, and with the same bits: test_builds.py


@contextmanager
def instead(path: Path) -> Iterator[None]:
    """Within the block the compiled implementation is the object at `path`."""
    library = cpu._Library(path)
    assert library.problem is None, library.problem
    with mock.patch.object(cpu, "loaded", return_value=library):
        yield
