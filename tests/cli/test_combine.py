"""`roadie combine`: what it writes is what the functions give, and what is refused writes nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import peft
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.cli.app import app
from roadie.rotation import parameter_size

SETTINGS = {"peft_type": "ROAD", "group_size": 4, "target_modules": ["a", "b"]}


def make(variant="road_2", seed=0, group_size=4, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in "ab":
        theta, alpha = torch.randn(2, parameter_size(variant, 8), generator=generator) * 0.2
        layers[path] = LayerParameters(theta, 1 + 0.3 * alpha, variant, group_size)
    return Adapter(layers, {**SETTINGS, "variant": variant, "group_size": group_size, **config})


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """Adapters in folders, by name."""
    adapters = {
        "one": make(),
        "two": make(seed=1),
        "small": make("road_1", seed=2),
        "twos": make(group_size=2),
        "foreign": make(base_model_name_or_path="qwen"),
        "homely": make(base_model_name_or_path="llama"),
        "singular": make(seed=3),
    }
    adapters["singular"].layers["b"].alpha[0] = 0
    for name, adapter in adapters.items():
        checkpoint.save(adapter, tmp_path / "adapters" / name)
    return {name: tmp_path / "adapters" / name for name in adapters}


def same(got: Adapter, wanted: Adapter) -> bool:
    return got.layers.keys() == wanted.layers.keys() and all(
        torch.equal(got.layers[path].theta, layer.theta) and torch.equal(got.layers[path].alpha, layer.alpha)
        for path, layer in wanted.layers.items()
    )


CALLS = {
    "compose": (["compose", "one", "two", "small"], lambda a, b, c: roadie.compose(c, roadie.compose(b, a))),
    "inverse": (["inverse", "one"], lambda a, *_: roadie.inverse(a)),
    "power": (["power", "one", "-e", "0.5"], lambda a, *_: roadie.power(a, 0.5)),
    "interpolate": (["interpolate", "one", "two", "--at", "0.25"], lambda a, b, _: roadie.interpolate(a, b, 0.25)),
    "mean": (["mean", "one", "two"], lambda a, b, _: roadie.mean([a, b])),
    "weights": (["mean", "one", "two", "-w", "3", "-w", "1"], lambda a, b, _: roadie.mean([a, b], [3, 1])),
    "corrected": (
        ["mean", "one", "two", "--magnitude-corrected"],
        lambda a, b, _: roadie.mean([a, b], magnitude_corrected=True),
    ),
    "subtract": (["subtract", "one", "two"], lambda a, b, _: roadie.subtract(a, b)),
    "convert": (["convert", "one", "--variant", "road_1"], lambda a, *_: roadie.convert(a, "road_1").adapter),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_verb_writes_what_the_function_gives(roadie_cli, saved, tmp_path, name):
    arguments, wanted = CALLS[name]
    paths = [saved.get(argument, argument) for argument in arguments]
    result = roadie_cli("combine", *paths, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = checkpoint.load(tmp_path / "out")
    assert same(found, wanted(*(checkpoint.load(saved[of]) for of in ("one", "two", "small"))))
    facts = json.loads(result.stdout)
    assert (facts["output"], facts["layers"]) == (str(tmp_path / "out"), 2)
    assert (facts["variant"], facts["parameters"]) == (found.variants[0].value, found.num_parameters)
    assert facts["adapters"] == [str(path) for path in paths if path in saved.values()]
    shown = roadie_cli("combine", *paths, "-o", tmp_path / "out", "--overwrite")
    assert f"parameters  {found.num_parameters:,}" in shown.stdout


def test_convert_says_what_is_lost(roadie_cli, saved, tmp_path):
    facts = json.loads(
        roadie_cli("combine", "convert", saved["one"], "--variant", "road_1", "-o", tmp_path / "a", "--json").stdout
    )
    conversion = roadie.convert(checkpoint.load(saved["one"]), "road_1")
    assert facts["share_lost"] == conversion.share_lost > 0
    assert facts["distance"] == conversion.distance
    assert facts["share_lost_by_layer"] == {path: loss.share for path, loss in conversion.losses.items()}
    shown = roadie_cli("combine", "convert", saved["one"], "--variant", "road_1", "-o", tmp_path / "b").stdout
    assert f"{conversion.share_lost:.2%} of the change" in shown
    exact = roadie_cli("combine", "convert", saved["one"], "--variant", "road_4", "-o", tmp_path / "c").stdout
    assert "lost        nothing" in exact


def test_distances_are_a_matrix_with_the_base(roadie_cli, saved):
    one, two = (checkpoint.load(saved[name]) for name in ("one", "two"))
    for metric in ("chordal", "geodesic"):
        arguments = ("combine", "distance", saved["one"], saved["two"], "--metric", metric)
        found = json.loads(roadie_cli(*arguments, "--json").stdout)
        assert found["names"] == ["base model", "one", "two"]
        between, alone = roadie.distance(one, two, metric), roadie.distance(roadie.power(one, 0), one, metric)
        assert found["distances"][1][2] == pytest.approx(between, rel=1e-12)
        assert found["distances"][0][1] == pytest.approx(alone, rel=1e-12)
        assert found["distances"][2][2] == pytest.approx(0, abs=1e-12)
        assert f"{between:.4f}" in roadie_cli(*arguments).stdout


def test_to_lora_is_loaded_by_stock_peft(roadie_cli, trained, tiny_path, tmp_path):
    arguments = ("combine", "to-lora", trained["two"], "-o", tmp_path / "lora", "--rank", 8)
    facts = json.loads(roadie_cli(*arguments, "--json").stdout)
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    lora = roadie.to_lora(checkpoint.load(trained["two"]), base, 8)
    assert facts["relative_error"] == pytest.approx(lora.relative_error, rel=1e-6)
    assert set(facts["ranks"].values()) == {8}
    ids = torch.arange(6)[None]
    wanted = base(ids).logits
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert not torch.allclose(loaded(ids).logits, wanted, atol=1e-3)
    shown = roadie_cli(*arguments[:-2], "--share", 0.5, "--overwrite").stdout
    assert "error" in shown
    assert len([line for line in shown.splitlines() if line.endswith("%")]) == 14
    both = roadie_cli(*arguments, "--share", 0.5)
    assert both.exit_code == 2
    assert "either --rank or --share" in both.stderr


REFUSED = {
    "different bases": (["compose", "homely", "foreign"], "different base models"),
    "different group sizes": (["compose", "one", "twos"], "layer a: got group_size"),
    "singular": (["inverse", "singular"], "layer b: "),
    "no logarithm": (["power", "singular", "-e", "0.5"], "layer b: "),
    "weights": (["mean", "one", "two", "-w", "-1", "-w", "2"], "weights"),
    "number of weights": (["mean", "one", "two", "-w", "1"], "2 adapters or rotations and 1 weights"),
    "group size": (["convert", "one", "--group-size", "2"], "share no pair"),
    "nothing to convert to": (["convert", "one"], "neither a variant nor a group size"),
    "no such adapter": (["inverse", "nowhere/at/all"], "no such file or folder"),
    "missing layers": (["to-lora", "one", "--rank", "2"], "layer a: got a model without it"),
    "rank": (["to-lora", "one", "--share", "2"], "got rank 2.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_message_and_writes_nothing(roadie_cli, saved, tmp_path, name):
    arguments, said = REFUSED[name]
    output = tmp_path / "out"
    result = roadie_cli("combine", *(saved.get(argument, argument) for argument in arguments), "-o", output)
    assert result.exit_code == 2
    message = result.stderr.splitlines()[-1]
    assert message.startswith("roadie: ")
    assert said in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]


def test_values_that_are_not_finite_are_refused(roadie_cli, saved, tmp_path):
    from safetensors.torch import load_file, save_file

    file = saved["one"] / checkpoint.WEIGHTS_NAME
    tensors = load_file(file)
    tensors["base_model.model.a.road_theta"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    result = roadie_cli("combine", "compose", saved["two"], saved["one"], "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "not finite" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_stays_unless_it_may_be_replaced(roadie_cli, saved, tmp_path):
    output = tmp_path / "out"
    assert roadie_cli("combine", "inverse", saved["one"], "-o", output).exit_code == 0
    before = (output / checkpoint.WEIGHTS_NAME).read_bytes()
    refused = roadie_cli("combine", "inverse", saved["two"], "-o", output)
    assert (refused.exit_code, "--overwrite" in refused.stderr) == (2, True)
    broken = roadie_cli("combine", "inverse", saved["singular"], "-o", output, "--overwrite")
    assert broken.exit_code == 2
    assert (output / checkpoint.WEIGHTS_NAME).read_bytes() == before
    assert sorted(path.name for path in output.iterdir()) == [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME]


def test_the_examples_of_the_help_are_valid():
    commands = typer.main.get_command(app).commands["combine"].commands
    assert sorted(commands) == sorted(
        ["compose", "convert", "distance", "interpolate", "inverse", "mean", "power", "subtract", "to-lora"]
    )
    for command in commands.values():
        examples = [line.strip() for line in command.help.splitlines() if line.strip().startswith("roadie ")]
        assert examples
        for example in examples:
            _, _, name, *arguments = shlex.split(example)
            commands[name].make_context(name, arguments)  # raises where it cannot be parsed
