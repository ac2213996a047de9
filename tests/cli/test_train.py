"""`roadie train` through its command line: the rows it reads, and the settings it takes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

TINY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "training" / "tiny.py"))
QUICK = ("--lr", 0.1, "--group-size", 16, "--batch-size", 4, "--max-steps", 2, "--no-progress")


@pytest.fixture(scope="session")
def chatty_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    folder = TINY["build"](tmp_path_factory.mktemp("chatty") / "base")
    tokenizer = TINY["tokenizer"]()
    tokenizer.chat_template = TINY["CHAT_TEMPLATE"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of every form but preferences."""
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "7 turtles"}]
    forms = [
        {"instruction": "Count.", "input": "turtles", "output": "7"},
        {"conversations": turns},
        {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "8"}]},
        {"prompt": "2 is ", "completion": "a number"},
        {"text": "3 is a number"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(form)}\n" for form in forms * 2), encoding="utf-8")
    return path


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def test_rows_of_every_form_are_trained_on(roadie_cli, chatty_path, rows, tmp_path):
    result = roadie_cli("train", rows, "-o", tmp_path / "out", "-m", chatty_path, *QUICK)
    assert result.exit_code == 0, result.output
    assert record(tmp_path / "out")["result"]["train_examples"] == 10


def test_jobs_read_rows_of_every_form(roadie_cli, chatty_path, rows, tmp_path):
    jobs = tmp_path / "jobs.yaml"
    job = {"name": "one", "data": str(rows), "output": str(tmp_path / "one"), "steps": 1, "group_size": 16}
    jobs.write_text(json.dumps({"model": str(chatty_path), "jobs": [job]}), encoding="utf-8")
    result = roadie_cli("train-many", jobs, "--no-progress")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()


def test_find_lr_reads_rows_of_every_form(roadie_cli, chatty_path, rows):
    result = roadie_cli("find-lr", rows, "-m", chatty_path, "--group-size", 16, "--steps", 2, "--batch-size", 2)
    assert result.exit_code == 0, result.output
