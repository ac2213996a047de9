"""What is shipped: the marker of types, the licence, the CPU kernel, built or its sources; the embedded model apart from it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tests.patience import HANG_S

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src")
PACKAGE = ROOT / "src" / "roadie"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive, built from a copy of the sources."""
    out = tmp_path_factory.mktemp("dist")
    build_in(copied_sources(tmp_path_factory.mktemp("sources") / "roadie"), out, dict(os.environ), "wheel", "sdist")
    return out


def copied_sources(copy: Path) -> Path:
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


CORE_WHEEL_BYTES = 2_000_000
DATA = ROOT / "packages" / "roadie-embedded-model"

pytestmark = [pytest.mark.slow, pytest.mark.long]


def build_in(sources: Path, out: Path, environment: dict[str, str], *kinds: str) -> None:
    """A wheel, and also a source archive ("wheel", "sdist"), of `sources` into `out`."""
    build = (
        "import sys; from setuptools import build_meta as b; _, out, *kinds = sys.argv\n"  # which building changes
        "for kind in kinds: getattr(b, f'build_{kind}')(out)"
    )
    arguments = [sys.executable, "-c", build, str(out), *kinds]
    subprocess.run(arguments, cwd=sources, env=environment, check=True, capture_output=True, text=True, timeout=HANG_S)


COMPILED = (".c", ".h")


def shipped(*left_out: str) -> set[str]:
    """Every file of the package that is not left over from building or running it, without those with the endings given."""
    return {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", *left_out)
    }


def test_the_wheel_holds_every_file_of_the_package(archives: Path) -> None:
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"roadie/py.typed", "roadie/embedded/corpus.py"} <= shipped(*COMPILED) <= names
    assert not [name for name in names if name.endswith(COMPILED)]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_small_and_the_embedded_model_one_of_its_own(archives: Path, tmp_path: Path) -> None:
    assert next(archives.glob("*.whl")).stat().st_size < CORE_WHEEL_BYTES
    copy = shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    build_in(copy, tmp_path, dict(os.environ), "wheel")
    with zipfile.ZipFile(next(tmp_path.glob("roadie_embedded_model-*-py3-none-any.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {path.relative_to(copy / "src").as_posix() for path in (copy / "src").rglob("*.[jms]*")} <= names
    assert {f"roadie_embedded_model/{name}" for name in ("__init__.py", "model/model.safetensors")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (DATA / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_source_archive_holds_every_file_of_the_package(archives: Path) -> None:
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in shipped()} | {"LICENSE", "pyproject.toml", "setup.py"} <= names
    assert any(name.endswith("kernels/cpu/rotate.c") for name in names)


def test_the_wheel_is_for_every_python_and_starts_the_command_line(archives: Path) -> None:
    wheel = next(archives.glob("*.whl"))
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        entry_points = next(
            content.read(name).decode() for name in content.namelist() if name.endswith("entry_points.txt")
        )
    assert "roadie = roadie.cli:main" in entry_points


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.skipif(os.environ.get("ROADIE_COMPILE") == "0", reason="ROADIE_COMPILE=0 leaves it out")
def test_the_wheel_holds_the_compiled_kernel(archives: Path, tmp_path: Path) -> None:
    name = "roadie/kernels/cpu/_rotate.so"
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as wheel:
        assert name in wheel.namelist()
        wheel.extract(name, tmp_path)
    assert ctypes.CDLL(str(tmp_path / name)).roadie_job_bytes() > 0


@pytest.mark.parametrize("wish", ["0", "without a compiler"])
def test_without_the_compiled_kernel_everything_else_is_installed(wish: str, tmp_path: Path) -> None:
    copy = copied_sources(tmp_path / "sources")
    environment = {**os.environ, **({"ROADIE_COMPILE": "0"} if wish == "0" else {"CC": "false"})}
    build_in(copy, tmp_path, environment, "wheel")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert shipped(*COMPILED) <= names
    assert not [name for name in names if name.endswith(".so")]


def test_a_compiled_kernel_that_is_insisted_on_is_built_or_refused(tmp_path: Path) -> None:
    copy = copied_sources(tmp_path / "sources")
    with pytest.raises(subprocess.CalledProcessError) as error:
        build_in(copy, tmp_path, {**os.environ, "ROADIE_COMPILE": "1", "CC": "false"}, "wheel")
    assert "the CPU kernel could not be built" in error.value.stderr


def test_the_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
