"""Every example runs as it stands, is short, and does what its first line says."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in an empty folder; what its names are at its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    return lambda name: runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_saved(folder, trained):
    """The adapter in `folder` is the one that was trained."""
    adapter = checkpoint.load(folder)
    assert adapter.num_parameters == 10_752
    assert all(layer.theta.any() for layer in adapter.layers.values())
    loaded = roadie.PeftModel.from_pretrained(roadie.embedded.load_model(), folder)
    state, expected = loaded.state_dict(), trained.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state if ".road_" in name)


def test_trainer(run):
    names = run("trainer.py")
    assert losses(names["trainer"])[-1] < losses(names["trainer"])[0] - 0.1
    assert_saved(Path("trainer-output/adapter"), names["model"])


def test_sft_trainer(run):
    pytest.importorskip("trl")
    names = run("sft_trainer.py")
    assert type(names["trainer"].model.base_model) is roadie.RoadModel
    assert losses(names["trainer"])[-1] < losses(names["trainer"])[0] - 1
    assert_saved(Path("sft-output/adapter"), names["trainer"].model)


def test_mixed_batch(run, capsys):
    names = run("mixed_batch.py")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["french", "polite", "__base__"]
    tokenizer, model = names["tokenizer"], names["model"]
    prompt = tokenizer(["class Tree:"], return_tensors="pt")
    with model.disable_adapter():
        alone = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert printed[2].endswith(repr(tokenizer.decode(alone[0], skip_special_tokens=True)))


def test_merge(run, capsys):
    names = run("merge.py")
    assert (names["before"] - names["after"]).abs().max() < 1e-5 * names["before"].abs().max()
    with torch.no_grad():
        base = roadie.embedded.load_model()(**names["batch"]).logits
    assert (names["before"] - base).abs().max() > 0.1
    assert capsys.readouterr().out.startswith("largest difference of a logit:")
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.float32


def test_many_adapters(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example", "4", "6"])
    names = run("many_adapters.py")
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("4 adapters, 6 steps, ")
    assert [row.split()[0] for row in rows] == [job["name"] for job in names["jobs"]]
    for job in names["result"].jobs:
        adapter = checkpoint.load(job.output)
        assert adapter.num_parameters == 10_752
        assert all(layer.theta.any() for layer in adapter.layers.values())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_fifteen_lines_and_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines()[tree.body[0].end_lineno :] if line.strip()]
    assert len([line for line in lines if not line.lstrip().startswith("#")]) <= 15
    assert f"test_{path.stem}" in globals()
