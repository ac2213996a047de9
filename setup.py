"""The one part of roadie that is compiled: src/roadie/kernels/cpu, plain C that is loaded with ctypes.

It needs no headers of Python or torch, so that one wheel serves every Python version of a platform. Where there is no C
compiler, or what it makes cannot be loaded, roadie is installed without it and computes with plain tensor operations.
ROADIE_COMPILE=0 leaves it out on purpose; ROADIE_COMPILE=1 makes a failure an error. ROADIE_X86_LEVEL=v3 builds it without
AVX-512, so that a processor which has it computes what others do.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "src/roadie/kernels/cpu"
HEADERS = [f"{FOLDER}/{name}" for name in ("element.h", "vector.h", "template.h", "spans.h", "job.h")]
WISH = os.environ.get("ROADIE_COMPILE", "")
LEVEL = os.environ.get("ROADIE_X86_LEVEL", "v4")

# Products and sums are rounded one by one, as the reference does.
GNU = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-g0"]
GNU_LEVELS = {
    "spans_v4_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "spans_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "spans_v3": ["-march=x86-64-v3"],
}


class Attempt:
    """One way to build: flags for all sources, those of OpenMP, the x86 levels besides the default one, and the files."""

    def __init__(
        self, flags: list[str], openmp: list[str], levels: dict[str, list[str]], files: tuple[str, ...] = ("rotate.c",)
    ) -> None:
        self.flags, self.openmp, self.levels, self.files = flags, openmp, levels, files


def attempts(compiler_type: str) -> list[Attempt]:
    """From the best way to the plainest; the first that gives an object which can be loaded is taken."""
    if compiler_type == "msvc":
        return [Attempt(["/O2", "/std:c11", "/fp:precise"], ["/openmp"], {}), Attempt(["/O2", "/std:c11"], [], {})]
    if LEVEL not in ("v3", "v4"):
        raise RuntimeError(f"got ROADIE_X86_LEVEL={LEVEL!r}; wanted v3 or v4")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = {name: GNU_LEVELS["spans_v3"] if LEVEL == "v3" else flags for name, flags in GNU_LEVELS.items() if is_x86}
    # calls.c uses functions of Python, which not every linker leaves to be found when the object is loaded.
    return [
        Attempt(GNU, openmp, chosen, files)
        for chosen in ([levels, {}] if levels else [{}])
        for openmp in (["-fopenmp"], [])
        for files in (("rotate.c", "calls.c"), ("rotate.c",))
    ]


class BuildKernel(build_ext):
    """Compiles the loops once for each x86 level, and everything into one object without Python in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        problems = []
        for attempt in [] if WISH == "0" else attempts(self.compiler.compiler_type):
            try:
                self.build(attempt, target)
                return
            except Exception as error:
                problems.append(f"{error}")
        target.unlink(missing_ok=True)
        if WISH == "1":
            raise RuntimeError("the CPU kernel could not be built:\n" + "\n".join(problems))
        self.warn(f"roadie is installed without its compiled CPU kernel: {'; '.join(problems) or 'ROADIE_COMPILE=0'}")

    def build(self, attempt: Attempt, target: Path) -> None:
        """Compile, link and load once; raises if any of it fails."""
        with tempfile.TemporaryDirectory(prefix="roadie-kernel-") as temporary:
            objects = []
            for name, flags in {"spans_default": [], **attempt.levels}.items():
                arguments = {"macros": [("ROADIE_SET", name)], "extra_postargs": [*attempt.flags, *flags]}
                objects += self.compiler.compile([f"{FOLDER}/spans.c"], f"{temporary}/{name}", **arguments)
            macros = [("ROADIE_X86_LEVELS", "1")] if attempt.levels else []
            flags = [*attempt.flags, *attempt.openmp]
            files = [f"{FOLDER}/{name}" for name in attempt.files]
            objects += self.compiler.compile(files, temporary, macros=macros, extra_postargs=flags)
            made = Path(temporary, target.name)
            link = [flag for flag in attempt.openmp if not flag.startswith("/")]
            self.compiler.link_shared_object(objects, str(made), extra_postargs=link)
            check_loads(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(made), str(target))


def check_loads(made: Path) -> None:
    """Load the object in a process of its own: what crashes or misses a library must not be installed."""
    code = "import ctypes, sys; assert ctypes.CDLL(sys.argv[1]).roadie_job_bytes() > 0"
    subprocess.run([sys.executable, "-c", code, str(made)], check=True, capture_output=True, timeout=600)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of this platform: nothing in it depends on the version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "roadie.kernels.cpu._rotate",
            [f"{FOLDER}/{name}" for name in ("rotate.c", "calls.c", "spans.c")],
            depends=HEADERS,
            optional=WISH != "1",
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": PlatformWheel},
)
