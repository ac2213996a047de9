"""docs/combining.md: its Python is one program, then its commands are run in the same folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import HANG_S
from typer.testing import CliRunner

from roadie import checkpoint
from roadie.cli.app import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "combining.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_code_and_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "combining.py"
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        _, *arguments = shlex.split(command)
        result = CliRunner().invoke(app, arguments, prog_name="roadie")
        assert result.exit_code == 0, f"{command}: {result.output}"
        if "--output" in arguments and "to-lora" not in arguments:
            assert checkpoint.load(arguments[arguments.index("--output") + 1]).layers
