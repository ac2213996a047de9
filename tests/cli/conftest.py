"""The command line, and the tiny model of tests/training for its verbs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from roadie.cli.app import app

TINY = Path(__file__).resolve().parents[1] / "training" / "tiny.py"


@pytest.fixture
def roadie_cli():
    """Call it with arguments: a result with exit_code, stdout and stderr."""

    def call(*arguments: object):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="roadie")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    return runpy.run_path(str(TINY))["build"](tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(f"{json.dumps({'text': f'{n:02d} is a number of turtles'})}\n" for n in range(24)))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, texts: Path) -> dict[str, Path]:
    """Two adapters of the tiny model, by name, trained by the command line."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, variant in (("one", "road_1"), ("two", "road_2")):
        arguments = ["train", texts, "-o", folder / name, "-m", tiny_path, "--variant", variant]
        arguments += ["--group-size", 16, "--lr", 0.1, "--max-steps", 4, "--batch-size", 8, "--no-progress"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    return {name: folder / name for name in ("one", "two")}
