"""The command line under accelerate and torchrun: one result, one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import HANG_S

from roadie import checkpoint

ARGUMENTS = ("train", "notes.txt", "--output", "adapter", "--max-steps", "2", "--batch-size", "4", "--max-length", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_accelerate_trains_one_adapter_and_then_it_is_refused(folder: Path, launch) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command = [*accelerate, "--num_processes", "2", "-m", "roadie.cli", *ARGUMENTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss after") == 1
    assert checkpoint.load(folder / "adapter").num_parameters == 10_752
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "adapter"}
    again = launch("roadie.cli", *ARGUMENTS, cwd=folder, fails=True)
    assert again.stderr.count("adapter: got a folder that is not empty") == 1
