"""The frame of the command line: it starts fast, explains itself, and fails with one message."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer
from tests.versions import OLD_TYPER

import roadie
from roadie.cli import app as app_module
from roadie.cli.app import app
from roadie.errors import CheckpointError

VERBS = (
    "api-key",
    "bench-serve",
    "chat",
    "combine",
    "compare",
    "demo",
    "deploy",
    "eval",
    "find-lr",
    "fit",
    "generate",
    "info",
    "inspect",
    "merge",
    "serve",
    "train",
    "train-many",
)
HEAVY = ("torch", "transformers", "peft", "numpy", "rich", "safetensors", "huggingface_hub", "datasets", "roadie.tuner")


def roadie_process(*arguments, **options):
    command = [sys.executable, "-m", "roadie.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, text=True, **options)


def test_help_loads_nothing_heavy():
    script = f"""
import sys
from roadie.cli import main
sys.argv = ["roadie", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    allowed = ("loaded: []", "loaded: ['rich']") if OLD_TYPER else ("loaded: []",)
    assert done.stdout.splitlines()[-1] in allowed, done.stderr


def test_the_version(roadie_cli):
    assert roadie_cli("--version").stdout == f"roadie {roadie.__version__}\n"


def test_without_arguments_there_is_help(roadie_cli):
    result = roadie_cli()
    assert all(f"\n  {verb} " in result.output for verb in VERBS)
    assert sorted(typer.main.get_command(app).commands) == sorted(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(roadie_cli, verb):
    result = roadie_cli(verb, "--help")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert f"Usage: roadie {verb}" in lines[0]
    options = [line for line in lines if re.match(r"  (-\w, )?--\w", line)]
    for option in options:  # a name, and then words on the same line or on the next one
        after = lines[lines.index(option) + 1] if lines.index(option) + 1 < len(lines) else ""
        assert re.search(r"\s{2,}\S", option[4:]) or after.startswith(" " * 10), option


def examples_of(verb):
    command = typer.main.get_command(app)
    text = command.help if verb == "roadie" else command.commands[verb].help
    return [line.strip() for line in text.splitlines() if line.strip().startswith("roadie ")]


@pytest.mark.parametrize("verb", ["roadie", "generate", "info", "merge", "train", "train-many"])
def test_the_examples_of_the_help_are_valid(verb):
    examples = examples_of(verb)
    assert len(examples) >= 2
    for example in examples:
        _, name, *arguments = shlex.split(example.split("   ")[0])
        typer.main.get_command(app).commands[name].make_context(name, arguments)  # raises where it cannot be parsed


def test_an_error_is_one_message_and_exit_code_2(tmp_path):
    done = roadie_process("info", tmp_path)
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"roadie: {tmp_path / 'adapter_config.json'}")
    assert done.stdout == ""


def test_debug_shows_the_traceback(roadie_cli, tmp_path):
    assert roadie_cli("info", tmp_path).exit_code == 2
    with pytest.raises(CheckpointError):
        roadie_cli("--debug", "info", tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "roadie: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "roadie: interrupted. Nothing was written.\n"),
    ],
)
def test_what_the_system_refuses_is_a_message_too(roadie_cli, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("roadie.training.summary.summarise", fail)
    monkeypatch.setattr("roadie.training.adapters.adapter_folder", fail)
    result = roadie_cli("info", "x")
    assert result.exit_code == code
    assert said in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(roadie_cli, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("roadie.training.adapters.adapter_folder", fail)
    with pytest.raises(ZeroDivisionError):
        roadie_cli("info", "x")


def test_the_console_script_is_the_app(monkeypatch):
    called = []
    monkeypatch.setattr(app_module, "app", lambda **arguments: called.append(arguments))
    roadie.cli.main()
    assert called == [{"prog_name": "roadie"}]
