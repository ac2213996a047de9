"""The verbs, one after the other, as a person would use them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roadie import checkpoint, embedded

QUICK = ("--group-size", 16, "--max-steps", 2, "--batch-size", 8, "--no-progress")


def facts(output):
    """The two columns of a table, as a mapping."""
    lines = [line for line in output.splitlines() if line.strip()]
    return dict((line.split(None, 1) if "  " not in line else line.split("  ", 1)) for line in lines)


def test_train_prints_the_final_table(roadie_cli, tiny_path, texts, tmp_path):
    output = tmp_path / "adapter"
    result = roadie_cli("train", texts, "-o", output, "-m", tiny_path, "--eval-share", 0.25, "--lr", 0.1, *QUICK)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "training.json").read_text())["result"]
    table = {name.strip(): value.strip() for name, value in facts(result.stdout).items()}
    assert table["adapter"] == str(output)
    assert table["base model"] == str(tiny_path)
    assert table["examples"] == "18 and 6 held out"
    # The oldest transformers do not evaluate after the last step, so that of two steps none is the best.
    assert table["steps"] == (f"2, best at {record['best_step']}" if record["best_step"] is not None else "2")
    assert table["loss on"] == "held-out data"
    assert (table["loss before"], table["loss after"]) == (
        f"{record['loss_before']:.4f}",
        f"{record['loss_after']:.4f}",
    )
    assert table["trainable"].startswith(f"{record['trainable_parameters']:,} parameters, ")
    assert record["loss_after"] < record["loss_before"]
    assert {"file", "time", "speed"} <= table.keys()


def test_every_option_of_train_reaches_the_recipe(roadie_cli, tiny_path, texts, tmp_path):
    options = {
        "variant": "road_4",
        "group_size": 48,
        "share": "2/3 interleaved",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_ratio": 0.5,
        "weight_decay": 0.01,
        "epochs": 2.0,
        "max_steps": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 20,
        "precision": "float32",
        "eval_share": 0.5,
        "checkpoint_steps": 2,
        "patience": 3,
        "seed": 7,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags = [
        "--adapt-group-size",
        "--gradient-checkpointing",
        "--no-progress",
        "--target",
        "q_proj",
        "--target",
        "up_proj",
    ]
    result = roadie_cli("train", texts, "-o", tmp_path / "a", "-m", tiny_path, *arguments, *flags)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "a" / "training.json").read_text())["settings"]
    expected = {
        **options,
        "adapt_group_size": True,
        "gradient_checkpointing": True,
        "target_modules": ["q_proj", "up_proj"],
    }
    # All of them but the one that has no option, those that other tests give, and what the run adds.
    assert expected.items() <= settings.items()
    added = {"model", "revision", "data_sha256", "evaluation_sha256"}
    elsewhere = {
        "stages",
        "input_stages",
        "target_experts",
        "exclude_modules",
        "method",
        "beta",
        "packing",
        "load_in_4bit",
    }
    assert settings.keys() - expected.keys() - added == {"max_grad_norm", *elsewhere}


@pytest.mark.filterwarnings("ignore:this adapter has")
def test_train_takes_input_stages_and_info_shows_them(roadie_cli, tiny_path, texts, tmp_path):
    result = roadie_cli("train", texts, "-o", tmp_path / "a", "-m", tiny_path, "--input-stages", "16", *QUICK[2:])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a" / "training.json").read_text())["settings"]["input_stages"] == [16]
    adapter = checkpoint.load(tmp_path / "a")
    assert adapter.input_stages == ((16,),)
    assert any(bool(layer.theta.any()) for path, layer in adapter.layers.items() if path.endswith(".road_input"))
    shown = roadie_cli("info", tmp_path / "a").stdout
    assert "input_stages=[16]" in shown
    assert "q_proj.road_input" in shown
    for more in (("--input-stages", "2;16"), ("--input-stages", "7"), ("--input-stages", "16", "--share", "1/2")):
        result = roadie_cli("train", texts, "-o", tmp_path / "b", "-m", tiny_path, *more, *QUICK[2:])
        assert result.exit_code == 2
        assert "input" in result.stderr


@pytest.mark.filterwarnings("ignore:this adapter has several rotations")
def test_train_takes_stages_and_info_shows_them(roadie_cli, tiny_path, texts, tmp_path):
    result = roadie_cli("train", texts, "-o", tmp_path / "a", "-m", tiny_path, "--stages", "2,16", *QUICK[2:])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a" / "training.json").read_text())["settings"]["stages"] == [2, 16]
    assert checkpoint.load(tmp_path / "a").stages == ((2, 16),)
    shown = roadie_cli("info", tmp_path / "a").stdout
    assert "group size  2, 16" in " ".join(shown.split(" "))
    assert "stages=[2, 16]" in shown
    for bad in ("2;16", "2,7", ""):
        result = roadie_cli("train", texts, "-o", tmp_path / "b", "-m", tiny_path, "--stages", bad, *QUICK[2:])
        assert result.exit_code == 2
        assert "2,16,64" in result.stderr or "even numbers" in result.stderr


def test_train_names_the_bad_line(roadie_cli, tiny_path, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    result = roadie_cli("train", path, "-o", tmp_path / "out", "-m", tiny_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"roadie: {path}, line 2: got bad JSON")
    assert list(tmp_path.iterdir()) == [path]


def test_train_shows_a_progress_bar(roadie_cli, tiny_path, texts, tmp_path):
    result = roadie_cli("train", texts, "-o", tmp_path / "a", "-m", tiny_path, *QUICK[:-1])
    assert "2/2" in result.stderr
    assert "loss=" in result.stderr
    assert "2/2" not in result.stdout


def test_train_refuses_and_overwrites(roadie_cli, tiny_path, texts, trained, tmp_path):
    output = tmp_path / "adapter"
    shutil.copytree(trained["one"], output)
    arguments = ("train", texts, "-o", output, "-m", tiny_path, *QUICK)
    for refused in ((), ("--resume",)):
        result = roadie_cli(*arguments, *refused)
        assert result.exit_code == 2
        assert "--overwrite" in result.stderr
    assert roadie_cli(*arguments, "--overwrite").exit_code == 0
    assert json.loads((output / "training.json").read_text())["result"]["steps"] == 2


def test_info_says_what_is_in_the_file(roadie_cli, trained, tiny_path):
    result = roadie_cli("info", trained["two"])
    assert result.exit_code == 0
    for line in ("variant     road_2", f"base model  {tiny_path}", "group size  16", "layers      14"):
        assert line in result.stdout.splitlines()
    adapter = checkpoint.load(trained["two"])
    assert f"parameters  {adapter.num_parameters:,} in float32" in result.stdout
    rows = [line.split()[0] for line in result.stdout.split("-----\n")[-1].splitlines()]
    assert rows == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_info_for_machines(roadie_cli, trained):
    summary = json.loads(roadie_cli("info", trained["one"], "--json").stdout)
    assert (summary["variants"], summary["group_sizes"], summary["layers"]) == (["road_1"], [16], 14)
    assert summary["config"]["peft_type"] == "ROAD"
    assert summary["scale"]["least"] < 1 < summary["scale"]["most"]


def test_generate_gives_each_prompt_its_adapter(roadie_cli, trained):
    adapters = [part for name, path in trained.items() for part in ("--adapter", f"{name}={path}")]
    prompts = ("07 is ", "07 is ", "07 is ")
    use = ("-u", "one", "-u", "two", "-u", "__base__")
    result = roadie_cli("generate", *prompts, *adapters, *use, "--json", "-n", 12)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["prompt"], row["adapter"]) for row in rows] == [("07 is ", name) for name in ("one", "two", None)]
    alone = [
        json.loads(roadie_cli("generate", "07 is ", *adapters, "-u", name, "--json", "-n", 12).stdout)["text"]
        for name in ("one", "two", "__base__")
    ]
    assert [row["text"] for row in rows] == alone
    assert len(set(alone)) == 3


def test_generate_for_people(roadie_cli, trained):
    one = roadie_cli("generate", "07 is ", "-a", trained["one"], "-n", 5).stdout
    both = roadie_cli("generate", "07 is ", "08 is ", "-a", trained["one"], "-n", 5).stdout
    assert one.startswith("07 is ")
    assert both.startswith(f"[one]\n{one}\n[one]\n08 is ")


def test_generate_from_a_file_of_prompts(roadie_cli, trained, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "07 is ", "adapter": "two"}\n{"prompt": "08 is ", "adapter": null}\n')
    adapters = [part for name, adapter in trained.items() for part in ("-a", f"{name}={adapter}")]
    result = roadie_cli("generate", "--prompts", path, *adapters, "--json", "-n", 3)
    assert [json.loads(line)["adapter"] for line in result.stdout.splitlines()] == ["two", None]


def test_generate_uses_the_embedded_model_by_default(roadie_cli):
    result = roadie_cli("generate", "import ", "-n", 3, "--json")
    tokenizer = embedded.load_tokenizer()
    tokens = tokenizer("import ", return_tensors="pt")
    expected = embedded.load_model().generate(**tokens, max_new_tokens=3, do_sample=False)
    text = tokenizer.decode(expected[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(result.stdout) == {"prompt": "import ", "adapter": None, "text": text}


def test_merge_writes_a_model(roadie_cli, trained, tmp_path):
    output = tmp_path / "merged"
    result = roadie_cli("merge", trained["one"], trained["two"], "-o", output, "--max-shard-size", "200KB")
    assert result.exit_code == 0, result.output
    assert "adapters    one, two" in result.stdout
    assert "model-00001-of-" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32
    adapted = roadie_cli("generate", "07 is ", "-a", trained["one"], "-n", 8).stdout
    roadie_cli("merge", trained["one"], "-o", output, "--overwrite")
    assert roadie_cli("generate", "07 is ", "-m", output, "-n", 8).stdout == adapted


@pytest.mark.parametrize("verb", ["info", "generate", "merge"])
def test_a_pickle_is_refused_unless_allowed(roadie_cli, trained, tmp_path, verb):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(trained["one"] / "adapter_config.json", folder)
    torch.save(load_file(trained["one"] / "adapter_model.safetensors"), folder / "adapter_model.bin")
    arguments = {
        "info": ("info", folder),
        "generate": ("generate", "07 is ", "-a", folder, "-n", 2),
        "merge": ("merge", folder, "-o", tmp_path / "merged"),
    }[verb]
    refused = roadie_cli(*arguments)
    assert refused.exit_code == 2
    assert "pickle" in refused.stderr
    assert roadie_cli(*arguments, "--allow-pickle").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "x", "-a", "a.b=x"), "adapter name"),
        (("generate", "x", "-a", "no/such"), "no/such"),
        (("generate", "x", "-u", "nothing"), "got adapter 'nothing'"),
        (("generate", "x", "-m", "no-such-model"), "got 'no-such-model'; wanted a causal language model"),
        (("generate", "x", "--temperature", "-1"), "got temperature=-1.0"),
        (("merge", "no/such", "-o", "merged"), "no/such"),
        (("train", "no-such-file", "-o", "out"), "got neither a file nor a folder"),
        (("train", "x", "-o", "out", "--variant", "road_3"), "got variant='road_3'"),
        (("info", "no/such"), "no/such"),
    ],
)
def test_what_is_refused_is_said(roadie_cli, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = roadie_cli(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_info_of_the_runtime_says_which_kernel_rotates_what_and_why_not_another(roadie_cli):
    result = roadie_cli("info", "--runtime", "--json")
    here = json.loads(result.stdout)
    used = {choice["dtype"]: choice for choice in here["choices"] if choice["device"] == "cpu"}
    assert used["float64"]["used"] == "eager"
    assert "float64" in used["float64"]["refused"]["cpu"]
    assert here["versions"]["torch"] == torch.__version__
    shown = roadie_cli("info", "--runtime").stdout
    assert "float64" in shown
    assert used["float64"]["refused"]["cpu"] in shown


@pytest.mark.parametrize("arguments", [(), ("somewhere", "--runtime")])
def test_info_wants_an_adapter_or_the_runtime(roadie_cli, arguments):
    result = roadie_cli("info", *arguments)
    assert result.exit_code == 2
    assert "either" in result.output
