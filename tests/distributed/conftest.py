"""Programs on two processes of one thread each, started by torchrun as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.patience import HANG_S

FOLDER = Path(__file__).parent
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def start(
    program: Path | str, *arguments: object, count: int = 2, fails: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program, or a module (a name), on `count` processes; it must succeed, or fail, however long it takes."""
    what = [str(program)] if isinstance(program, Path) else ["-m", program]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    done = run_to_its_end([*command, *map(str, arguments)], environment, cwd)
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done


def run_to_its_end(
    command: list[str], environment: dict[str, str], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    """Run a program; where it hangs it is killed with every process that it has started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=cwd, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=HANG_S)
        except BaseException:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()  # torchrun starts each in a session of its own
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """`start`."""
    return start
