"""`roadie train` through its command line: the rows it reads, and the settings it takes."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import types
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
        ("lr: 1\nlearning_rate: 2", "got two values of --learning-rate"),
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


def preferences(path: Path, count: int = 12) -> Path:
    rows = [{"prompt": f"{n:02d} is ", "chosen": "a number", "rejected": "no " * (1 + n % 3)} for n in range(count)]
    return written(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def test_preferences_are_trained_by_dpo(roadie_cli, tiny_path, tmp_path):
    """The first loss is ln 2, since a fresh adapter is the reference; then the preferred answers become likelier."""
    pytest.importorskip("trl")
    data = preferences(tmp_path / "pairs.jsonl")
    arguments = ("--method", "dpo", "--beta", 0.5, "--eval-share", 0.25, "--epochs", 4, "--batch-size", 4, "--lr", 0.05)
    result = roadie_cli("train", data, "-o", tmp_path / "out", "-m", tiny_path, "--group-size", 16, *arguments)
    assert result.exit_code == 0, result.output
    said = record(tmp_path / "out")
    assert (said["settings"]["method"], said["settings"]["beta"]) == ("dpo", 0.5)
    losses = [entry["loss"] for entry in said["history"] if "loss" in entry]
    # logsigmoid and a mean of float32: a few roundings of a number below 1
    assert losses[0] == pytest.approx(math.log(2), abs=8 * 2**-24)
    assert said["result"]["loss_before"] == pytest.approx(math.log(2), abs=8 * 2**-24)
    assert losses[-1] < 0.6
    assert said["history"][-1]["eval_rewards/accuracies"] == 1.0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"
    }  # fmt: skip


def test_preferences_in_messages_are_trained_by_dpo(roadie_cli, chatty_path, tmp_path):
    pytest.importorskip("trl")
    turns = [{"role": "user", "content": "How many?"}], [{"role": "assistant", "content": "7"}]
    row = {"prompt": turns[0], "chosen": turns[1], "rejected": [{"role": "assistant", "content": "no idea"}]}
    data = written(tmp_path / "pairs.jsonl", f"{json.dumps(row)}\n" * 4)
    result = roadie_cli("train", data, "-o", tmp_path / "out", "-m", chatty_path, "--method", "dpo", *QUICK)
    assert result.exit_code == 0, result.output
    assert record(tmp_path / "out")["result"]["loss_before"] == pytest.approx(math.log(2), abs=8 * 2**-24)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--beta", 0.5), "got beta=0.5; wanted none with --method sft"),
        (("--method", "orpo"), "got method='orpo'; wanted one of sft, dpo"),
        (("--method", "dpo", "--packing"), "got packing=True; wanted none with --method dpo"),
        (("--method", "dpo"), "line 1: got a row to learn as it is; wanted a preference"),
        (("--patience", 2), "got patience=2 and nothing held out"),
        (("--report-to", "tensorbord"), "got report_to='tensorbord'; did you mean tensorboard?"),
        (("--report-to", "neptune"), "got report_to='neptune', whose package is not installed"),
        (("--hub-public",), "got --hub-public without --push-to-hub"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    roadie_cli, tiny_path, texts, tmp_path, options, said
):
    if "--method" in options:
        pytest.importorskip("trl")
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, "--no-progress", *options)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_preference_is_refused_without_dpo(roadie_cli, tiny_path, tmp_path):
    data = preferences(tmp_path / "pairs.jsonl")
    result = roadie_cli("train", data, "-o", tmp_path / "out", "-m", tiny_path)
    assert result.exit_code == 2
    assert f"{data}, line 1: got a preference" in result.stderr


def test_without_a_network_an_upload_is_refused_before_training(roadie_cli, tiny_path, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, "--push-to-hub", "owner/name", *QUICK)
    assert result.exit_code == 2, result.output
    assert (
        "got push_to_hub='owner/name'; wanted a repository that can be written to, before anything is trained"
        in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_the_finished_adapter_is_uploaded(roadie_cli, tiny_path, texts, tmp_path, monkeypatch):
    done = []

    def create_repo(self, repo_id, *, private, exist_ok):
        assert not (tmp_path / "out").exists()
        done.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        done.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, "--push-to-hub", "owner/name", *QUICK)
    assert result.exit_code == 0, result.output
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"]
    assert done == [("owner/name", True, True), ("owner/name", files)]
    assert record(tmp_path / "out")["push_to_hub"] == "owner/name"


def test_an_upload_that_fails_leaves_the_adapter_and_says_how_to_repeat_it(
    roadie_cli, tiny_path, texts, tmp_path, monkeypatch
):
    def fail(self, **_):
        raise ConnectionError("gone")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fail)
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, "--push-to-hub", "owner/name", *QUICK)
    assert result.exit_code == 2
    assert f"run: hf upload owner/name {tmp_path / 'out'}" in result.stderr
    assert record(tmp_path / "out")["result"]["steps"] == 2


def test_losses_are_reported_while_training(roadie_cli, tiny_path, texts, tmp_path, monkeypatch):
    """A TensorBoard that writes down what it is told, and where; its files outlive the working folder."""
    told = []

    class SummaryWriter:
        def __init__(self, log_dir):
            told.append(("place", log_dir))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def add_text(self, *_):
            pass

        flush = close = lambda self: None

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    options = ("--report-to", "tensorboard", "--eval-share", 0.25)
    result = roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, *options, *QUICK)
    assert result.exit_code == 0, result.output
    assert told[0] == ("place", str(tmp_path / "out.runs"))
    assert [step for name, step in told if name == "train/loss"] == [1, 2]
    assert ("eval/loss", 2) in told
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert record(tmp_path / "out")["report_to"] == ["tensorboard"]
