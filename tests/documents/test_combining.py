"""docs/combining.md: its Python is one program, then its commands are run in the same folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.guides import blocks_of, run
from typer.testing import CliRunner

from roadie import checkpoint
from roadie.cli.app import app


def test_the_code_and_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(blocks_of("combining.md"), tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks_of("combining.md", "bash") for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        _, *arguments = shlex.split(command)
        result = CliRunner().invoke(app, arguments, prog_name="roadie")
        assert result.exit_code == 0, f"{command}: {result.output}"
        if "--output" in arguments and "to-lora" not in arguments:
            assert checkpoint.load(arguments[arguments.index("--output") + 1]).layers
