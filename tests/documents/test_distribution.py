"""What is shipped: the wheel and the source archive hold the embedded model, the marker of types and the licence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")
PACKAGE = ROOT / "src" / "roadie"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive, built from a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = (
        "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"
    )
    subprocess.run([sys.executable, "-c", build, out], cwd=copy, check=True, capture_output=True, timeout=300)
    return out


def shipped() -> set[str]:
    """Every file of the package that is not left over from running it."""
    return {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_holds_every_file_of_the_package(archives: Path) -> None:
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"roadie/py.typed", "roadie/embedded/model/model.safetensors"} <= shipped() <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_holds_every_file_of_the_package(archives: Path) -> None:
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in shipped()} | {"LICENSE", "pyproject.toml"} <= names


def test_the_wheel_is_pure_python_and_starts_the_command_line(archives: Path) -> None:
    wheel = next(archives.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        entry_points = next(
            content.read(name).decode() for name in content.namelist() if name.endswith("entry_points.txt")
        )
    assert "roadie = roadie.cli:main" in entry_points


def test_the_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
