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


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_settings_is_a_command_line(roadie_cli, tiny_path, texts, tmp_path):
    """Each kind of option from a file: words, numbers, flags, lists, another name of one; and the command line wins."""
    config = written(
        tmp_path / "settings.yaml",
        f"data: {texts}\noutput: {tmp_path / 'out'}\nmodel: {tiny_path}\nlr: 1e-1\nbatch-size: 4\n"
        "max_steps: 50\ntarget: [q_proj, v_proj]\nstages: [2, 16]\ngradient-checkpointing: true\nprogress: false\nseed: null\n",
    )
    result = roadie_cli("train", "--config", config, "--max-steps", 2, "--target", "k_proj")
    assert result.exit_code == 0, result.output
    settings = record(tmp_path / "out")["settings"]
    wanted = {"learning_rate": 0.1, "batch_size": 4, "gradient_checkpointing": True, "stages": [2, 16], "seed": 0}
    assert {key: settings[key] for key in wanted} == wanted
    assert (settings["max_steps"], settings["target_modules"]) == (2, ["k_proj"])
    assert "training:" not in result.output  # no progress bar


def test_a_file_of_settings_says_the_same_as_the_options(roadie_cli, tiny_path, texts, tmp_path):
    config = written(tmp_path / "settings.yaml", "learning_rate: 0.1\ngroup-size: 16\nbatch_size: 4\nmax_steps: 2\n")
    for name, settings in (("file", ("--config", config, "--no-progress")), ("options", QUICK)):
        assert roadie_cli("train", texts, "-o", tmp_path / name, "-m", tiny_path, *settings).exit_code == 0
    of_file, of_options = (tmp_path / name / "adapter_model.safetensors" for name in ("file", "options"))
    assert of_file.read_bytes() == of_options.read_bytes()
    assert record(tmp_path / "file")["settings"] == record(tmp_path / "options")["settings"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "learing_rate: 1",
            "got unknown setting learing_rate; did you mean learning-rate?; wanted some of data, output",
        ),
        ("config: x.yaml", "got unknown setting config"),
        ("lr: 1\nlearning_rate: 2", "got two values of learning_rate"),
        ("seed: 1\nseed: 2", "got seed twice"),
        ("gradient_checkpointing: 1", "got gradient_checkpointing=1; wanted true or false"),
        ("batch_size: true", "got batch_size=True; wanted a whole number"),
        ("batch_size: 2.5", "got batch_size=2.5; wanted a whole number"),
        ("epochs: many", "got epochs='many'; wanted a number"),
        ("model: {name: x}", "wanted a text or a number"),
        ("- data", "got list; wanted a mapping"),
        ("a: [", "while parsing"),
    ],
)
def test_what_a_file_of_settings_may_not_say(roadie_cli, texts, tmp_path, text, said):
    config = written(tmp_path / "settings.yaml", text)
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "--config", config)
    assert result.exit_code == 2
    assert f"roadie: {config}: " in result.stderr
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
