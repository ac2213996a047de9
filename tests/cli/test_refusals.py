"""Whatever a person gets wrong is said in one line, with names that exist, in the words of the command line."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from roadie import checkpoint
from roadie.cli.refusals import Option, in_options, message_of

QUICK = ("--group-size", 16, "--max-steps", 1, "--batch-size", 8, "--no-progress")


def refused(result):
    """The one line that a verb was refused with."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("roadie: ")]
    assert result.stderr.splitlines()[-1] == line, result.stderr
    assert "Traceback" not in result.output
    return line


def offered(line):
    """The names that a refusal says there are."""
    return ast.literal_eval(line.partition("such as ")[2])


@pytest.fixture
def no_hub(monkeypatch):
    """Asking the hub is a failure of the test."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


@pytest.mark.parametrize(
    ("verb", "more"), [("train", ("-o", "out")), ("find-lr", ("--steps", 2)), ("fit", ("-o", "out"))]
)
def test_a_mistyped_target_is_answered_with_the_nearest_names(
    roadie_cli, tiny_path, texts, tmp_path, monkeypatch, verb, more
):
    monkeypatch.chdir(tmp_path)
    what = texts if verb != "fit" else tiny_path
    typo = ("--target", "up_prj")
    line = refused(roadie_cli(verb, what, "-m", tiny_path, "--group-size", 16, *typo, *more))
    assert "'up_prj'" in line
    assert offered(line)[0] == "up_proj"
    assert {"q_proj", "k_proj", "down_proj"} <= set(offered(line))
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_target_of_a_job_is_answered_too(roadie_cli, tiny_path, texts, tmp_path):
    jobs = tmp_path / "jobs.yaml"
    job = {"name": "a", "data": str(texts), "output": str(tmp_path / "a"), "steps": 1, "group_size": 16}
    jobs.write_text(json.dumps({"model": str(tiny_path), "jobs": [{**job, "targets": ["up_prj"]}]}))
    line = refused(roadie_cli("train-many", jobs))
    assert "job 'a'" in line
    assert offered(line)[0] == "up_proj"


@pytest.mark.parametrize("place", ["./nowhere", "/no/such/place", "~/nowhere", "a/b/c", "here/nowhere"])
def test_a_model_folder_that_does_not_exist_is_missing_before_the_hub_is_asked(
    roadie_cli, texts, tmp_path, monkeypatch, no_hub, place
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    arguments = {
        "train": ("train", texts, "-o", "out"),
        "find-lr": ("find-lr", texts),
        "generate": ("generate", "x"),
        "merge": ("merge", "someone/adapter", "-o", "out"),
    }
    for verb, given in arguments.items():
        line = refused(roadie_cli(*given, "-m", place))
        assert f"got {place!r}, which does not exist" in line, verb
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("place", ["./nowhere", "/no/such/place", "a/b/c", "here/nowhere"])
def test_an_adapter_or_text_that_does_not_exist_is_missing_before_the_hub_is_asked(
    roadie_cli, tmp_path, monkeypatch, no_hub, place
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    asked = ("someone/model", "-o", "out")
    for arguments in (
        ("info", place),
        ("generate", "x", "-a", place),
        ("merge", place, "-o", "out"),
        ("fit", place, "-o", "out"),
        ("combine", "inverse", place, "-o", "out"),
        ("train", place, "-m", *asked),
        ("train", "here", "--eval-data", place, "-m", *asked),
        ("find-lr", place, "-m", asked[0]),
        ("fit", "here", "--text", place, "-o", "out"),
    ):
        line = refused(roadie_cli(*arguments))
        assert place.removeprefix("./") in line, arguments
        assert "got no such f" in line or "got neither a file nor a folder" in line, arguments


def test_a_folder_that_is_no_model_says_what_it_is(roadie_cli, trained, tmp_path):
    line = refused(roadie_cli("generate", "x", "-m", trained["one"]))
    assert "an adapter; wanted a causal language model" in line
    line = refused(roadie_cli("generate", "x", "-m", tmp_path))
    assert "a folder without config.json" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"model_type": "llama"', b'{"model_type": "unheard-of"}'])
def test_a_broken_model_is_one_line(roadie_cli, tiny_path, tmp_path, name, content):
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    (folder / name).write_bytes(content)
    line = refused(roadie_cli("generate", "x", "-m", folder, "-n", 1))
    assert f"got {str(folder)!r}; wanted" in line
    assert len(line) < 800


@pytest.mark.parametrize("verb", ["info", "generate", "merge", "combine"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"peft_type": "ROAD"', b"[]", b'{"peft_type": "LORA"}'])
def test_a_broken_adapter_is_one_line(roadie_cli, trained, tmp_path, verb, content):
    folder = shutil.copytree(trained["one"], tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content)
    out = ("-o", tmp_path / "out")
    more = {
        "info": (folder,),
        "generate": ("x", "-a", folder),
        "merge": (folder, *out),
        "combine": ("inverse", folder, *out),
    }
    assert str(folder) in refused(roadie_cli(verb, *more[verb]))


def test_files_that_cannot_be_read_are_one_line(roadie_cli, tmp_path, tiny_path, texts):
    bad = tmp_path / "bad.yaml"
    bad.write_text("jobs: [\n  a: {b")
    refused(roadie_cli("train-many", bad))
    bad.write_bytes(b"\xff\xfe\x00")
    refused(roadie_cli("train-many", bad))
    refused(roadie_cli("deploy", bad, "--dry-run"))
    refused(roadie_cli("serve", "--api-keys", bad, "--port", 0))
    refused(roadie_cli("generate", "--prompts", bad))
    refused(roadie_cli("bench-serve", "--key-file", bad))
    refused(roadie_cli("api-key", "me", "--file", bad))
    refused(roadie_cli("train-many", tmp_path / "nowhere.yaml"))
    refused(roadie_cli("generate", "--prompts", tmp_path))
    refused(roadie_cli("train", bad, "-o", tmp_path / "out", "-m", tiny_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--group-size", 48), "--adapt-group-size"),
        (("--group-size", 48), "--exclude"),
        (("--group-size", 7), "--group-size 64"),
        (("--batch-size", 8, "--micro-batch-size", 3), "change --batch-size or --micro-batch-size"),
        (("--eval-share", 1), "--eval-share 0.1"),
        (("--stages", "3"), "--stages 2,16,64"),
        (("--input-stages", "3"), "--input-stages 64"),
        (("--eval-share", 0.1, "--eval-data", "{texts}"), "--eval-share"),
    ],
)
def test_advice_names_options(roadie_cli, tiny_path, texts, tmp_path, arguments, said):
    given = [str(argument).format(texts=texts) for argument in arguments]
    line = refused(roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, *given))
    advice = line.partition("; ")[2] if "--eval-data" not in given else line
    assert said in advice
    for word in ("adapt_group_size", "exclude_modules", "group_size=", "batch_size", "eval_share", "stages=("):
        assert word not in advice


def test_settings_are_spelled_as_the_options_of_the_verb():
    options = {
        "group_size": Option("--group-size", is_flag=False, is_repeated=False),
        "adapt_group_size": Option("--adapt-group-size", is_flag=True, is_repeated=False),
        "target_modules": Option("--target", is_flag=False, is_repeated=True),
        "share": Option("--share", is_flag=False, is_repeated=False),
        "trust_remote_code": Option("--trust-remote-code", is_flag=True, is_repeated=False),
    }
    for message, expected in {
        "got group_size=7; wanted another; try group_size=64": "got group_size=7; wanted another; try --group-size 64",
        "got x; set adapt_group_size=True.": "got x; set --adapt-group-size.",
        "use target_modules=['q_proj', 'v_proj'], or not": "use --target q_proj --target v_proj, or not",
        "this share of it; lower share='1/4'": "this share of it; lower --share 1/4",
        "only with trust_remote_code (--trust-remote-code)": "only with --trust-remote-code",
        "no other_group_size, and a.group_size": "no other_group_size, and a.group_size",
    }.items():
        assert in_options(message, options) == expected
    assert in_options("try group_size=64", {}) == "try group_size=64"


def raised_in(module, error):
    """An exception as code of that module raises it."""
    scope = {"__name__": module, "error": error}
    try:
        exec("raise error", scope)
    except Exception as caught:
        return caught


def test_what_libraries_refuse_is_one_line_and_a_fault_is_none():
    line = message_of(raised_in("peft.tuners.x", ValueError("no\n  such thing")))
    assert line == "peft refused (ValueError): no such thing; roadie --debug ... shows where"
    assert message_of(raised_in("roadie.cli.x", SafetensorError("header too large"))).startswith("safetensors refused")
    assert message_of(raised_in("roadie.training.x", ValueError("a fault"))) is None
    assert message_of(raised_in("transformers.x", AttributeError("a fault"))) is None
    assert message_of(raised_in("torch.x", RuntimeError("shapes differ"))) is None
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: 8 GB"),
    ):
        assert message_of(raised_in("torch.x", error)).startswith("out of memory (")
    assert (
        message_of(raised_in("os", PermissionError(13, "Permission denied", "/x")))
        == "[Errno 13] Permission denied: '/x'"
    )


def test_a_library_that_refuses_ends_a_verb_with_one_line(roadie_cli, tiny_path, texts, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise raised_in("peft.mapping", ValueError("got a model of another kind"))

    monkeypatch.setattr("roadie.training.run.get_peft_model", refuse)
    line = refused(roadie_cli("train", texts, "-o", tmp_path / "out", "-m", tiny_path, *QUICK))
    assert line.startswith("roadie: peft refused (ValueError): got a model of another kind")


def exit_and_log(roadie_cli, caplog, *arguments):
    caplog.clear()
    result = roadie_cli(*arguments)
    assert result.exit_code == 0, result.output
    return [record.getMessage() for record in caplog.records if "does not blend with others" in record.getMessage()]


def test_smaller_groups_are_said_where_they_happen(roadie_cli, tiny_path, texts, tmp_path, caplog):
    train = (
        "train",
        texts,
        "-m",
        tiny_path,
        "--max-steps",
        1,
        "--batch-size",
        8,
        "--no-progress",
        "--adapt-group-size",
    )
    (line,) = exit_and_log(roadie_cli, caplog, *train, "--group-size", 48, "-o", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["group_size"] == 48
    assert "groups are smaller than 48 in some layers" in line
    assert "q_proj 16" in line
    assert exit_and_log(roadie_cli, caplog, *train, "--group-size", 16, "-o", tmp_path / "b") == []
    for verb in ("train", "find-lr", "fit"):
        help_text = " ".join(roadie_cli(verb, "--help").output.split())
        assert "cannot be blended with others" in help_text


def test_excluded_names_are_left_out(roadie_cli, tiny_path, texts, tmp_path):
    common = ("-m", tiny_path, "--exclude", "q_proj", "--exclude", "layers.0.mlp.up_proj")
    assert roadie_cli("train", texts, "-o", tmp_path / "a", *common, *QUICK).exit_code == 0
    paths = set(checkpoint.load(tmp_path / "a").layers)
    assert len(paths) == 14 - 2 - 1
    assert not any(path.endswith("q_proj") for path in paths)
    assert any(path.endswith("layers.1.mlp.up_proj") for path in paths)
    jobs = tmp_path / "jobs.yaml"
    job = {"name": "b", "data": str(texts), "output": str(tmp_path / "b"), "steps": 1, "group_size": 16}
    job["exclude"] = ["q_proj", "layers.0.mlp.up_proj"]
    jobs.write_text(json.dumps({"model": str(tiny_path), "jobs": [job]}))
    assert roadie_cli("train-many", jobs).exit_code == 0
    assert set(checkpoint.load(tmp_path / "b").layers) == paths
    assert roadie_cli("find-lr", texts, *common, "--group-size", 16, "--steps", 2).exit_code == 0


def test_names_that_match_nothing_beside_others_are_warnings_on_a_line_each(tiny_path, texts, tmp_path):
    given = (
        "--target",
        "q_proj",
        "--target",
        "k_proj",
        "--target",
        "up_prj",
        "--exclude",
        "k_proj",
        "--exclude",
        "q_prj",
    )
    command = [
        sys.executable,
        "-m",
        "roadie.cli",
        "train",
        texts,
        "-m",
        tiny_path,
        "-o",
        tmp_path / "a",
        *given,
        *QUICK,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    for option, typo, meant in (("target_modules", "up_prj", "up_proj"), ("exclude_modules", "q_prj", "q_proj")):
        (line,) = [line for line in lines if option in line or f"'{typo}'" in line]
        assert line.startswith("warning: ")
        assert f"'{typo}'" in line
        assert meant in line.partition(f"'{typo}'")[2]
