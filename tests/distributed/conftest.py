"""Programs on two processes of one thread each, started by torchrun as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SECONDS = 120

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def start(
    program: Path | str, *arguments: object, count: int = 2, fails: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program, or a module (a name), on `count` processes; it must succeed, or fail, within `SECONDS`."""
    what = [str(program)] if isinstance(program, Path) else ["-m", program]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=cwd
    )
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def launch() -> Launch:
    """`start`."""
    return start
