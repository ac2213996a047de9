"""DDP, FSDP2 and tensor parallelism on two processes: losses, gradients, files and resuming as in one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.once import once
from tests.patience import HANG_S
from tests.versions import OLD_TRANSFORMERS

from roadie import checkpoint
from roadie.testing.accuracy import relative_error, unit_roundoff

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        OLD_TRANSFORMERS,
        reason="torch 2.6's FSDP2 has no ignored_params, and the parallel layers of transformers 5.0 are no DTensors",
    ),
]

FOLDER = Path(__file__).parent
VARIANTS = ("road_1", "road_2", "road_4")
WAYS = ("ddp", "fsdp", "tp", "tp_base_first")

# The models compute in float64. Two orders of summation of n terms differ by at most n 2^-53 of the sum of their sizes; a
# gradient sums over 48 tokens, of products that end chains of 2 x 14 layers of at most 64 inputs: n < 2^17.
ORDER_OF_SUMMATION = 2**17 * unit_roundoff(torch.float64)
# transformers computes the loss in float32: a mean over 44 tokens, each the logarithm of a sum over 64 words, and then a mean
# of such means: n < 2^7.
OF_LOSSES = 2**7 * unit_roundoff(torch.float32)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, launch) -> Path:
    """A folder with what program_sharded.py and program_stock.py have written."""

    def fill(folder: Path) -> None:
        launch(FOLDER / "program_sharded.py", folder)
        subprocess.run([sys.executable, FOLDER / "program_stock.py", folder], check=True, timeout=HANG_S)

    return once(tmp_path_factory, "sharded", fill)


def trace(done: Path, way: str, variant: str, rank: int = 0) -> dict:
    return torch.load(done / f"{way}-{variant}-{rank}.pt")


@pytest.mark.parametrize(
    ("way", "variant"), [*product(WAYS, VARIANTS), ("ddp", "inputs"), ("fsdp", "inputs")], ids="-".join
)
def test_losses_gradients_and_a_resumed_adapter_are_those_of_one_process(way: str, variant: str, done: Path) -> None:
    wanted = trace(done, "one", variant)
    assert len(wanted["losses"]) == 4
    assert wanted["losses"][-1] < wanted["losses"][0]
    for rank in range(2):
        found = trace(done, way, variant, rank)
        assert found["losses"] == pytest.approx(wanted["losses"], rel=OF_LOSSES)
        for what in ("gradients", "parameters"):
            assert found[what].keys() == wanted[what].keys()
            for name, tensor in wanted[what].items():
                assert tensor.dtype == torch.float64
                assert relative_error(found[what][name], tensor) <= ORDER_OF_SUMMATION, f"{what} of {name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_in_half_precision_is_as_accurate_in_shards(variant: str, done: Path) -> None:
    one, truth = trace(done, "one_half", variant), trace(done, "truth_half", variant)
    for rank in range(2):
        found = trace(done, "fsdp_half", variant, rank)
        assert found["losses"] == pytest.approx(one["losses"], rel=unit_roundoff(torch.bfloat16))
        for name, tensor in truth["gradients"].items():
            ours, theirs = found["gradients"][name], one["gradients"][name]
            assert ours.dtype == theirs.dtype == torch.float32
            assert relative_error(ours, tensor) <= 1.1 * relative_error(theirs, tensor), name
            assert relative_error(theirs, tensor) > unit_roundoff(torch.float32), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_saved_adapters_load_in_stock_peft(way: str, variant: str, done: Path) -> None:
    adapter = checkpoint.load(done / f"adapter-{way}-{variant}")
    parameters = trace(done, way, variant)["parameters"]
    for path, layer in adapter.layers.items():
        for store, value in (("road_theta", layer.theta), ("road_alpha", layer.alpha)):
            assert torch.equal(value, parameters[f"base_model.model.{path}.{store}.default"]), path
    found, wanted = torch.load(done / f"stock-adapter-{way}-{variant}.pt"), torch.load(done / f"logits-{variant}.pt")
    assert relative_error(found, wanted) <= 2**7 * unit_roundoff(torch.float32)  # PEFT adds in float32 here and there


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_whole_adapter_has_the_inputs_too(way: str, done: Path) -> None:
    adapter = checkpoint.load(done / f"whole-{way}-inputs")
    assert adapter.input_stages == ((2, 4), (8,))
    parameters = trace(done, way, "inputs")["parameters"]
    assert len(parameters) == 2 * len(adapter.layers)
    for path, layer in adapter.layers.items():
        for store, value in (("road_theta", layer.theta), ("road_alpha", layer.alpha)):
            assert torch.equal(value, parameters[f"base_model.model.{path}.{store}.default"]), path


def test_rows_of_different_adapters_in_different_processes(done: Path) -> None:
    first, second = (torch.load(done / f"rows-{rank}.pt") for rank in range(2))
    wanted = first["one"]
    used = {name: gradient for name, gradient in wanted.items() if gradient is not None}
    assert {name.rpartition(".")[2] for name in used} == {"a", "b"}
    for way in ("ddp_names", "ddp_rows", "replicas"):
        for name, gradient in used.items():
            assert relative_error(first[way][name], gradient) <= ORDER_OF_SUMMATION, f"{way} {name}"
            assert torch.equal(first[way][name], second[way][name]), f"{way} {name}"
    for name in wanted.keys() - used.keys():
        assert first["replicas"][name] is second["replicas"][name] is None
        assert not first["ddp_rows"][name].any()  # roadie.rows puts all adapters into the table


def test_gradients_are_averaged_when_they_are_asked_for(done: Path) -> None:
    parts = [torch.load(done / f"rows-{rank}.pt") for rank in range(2)]
    for name, wanted in parts[0]["one"].items():
        if wanted is None:
            continue
        own = [part[f"no_sync-{rank}"][name] for rank, part in enumerate(parts)]
        assert sum(gradient is None for gradient in own) == 1  # the other process has no row of this adapter
        for part in parts:
            assert relative_error(part["twice"][name], 2 * wanted) <= ORDER_OF_SUMMATION
        is_of_a = name.endswith(".a")
        for part in parts:
            by_hand = part["by_hand"][name]
            assert (by_hand is not None) == is_of_a
            assert not is_of_a or relative_error(by_hand, wanted) <= ORDER_OF_SUMMATION


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "ConfigError: .*k_proj: got out_features=16 over 2 processes with group_size=16.*wanted whole groups"),
        ("stages", r"ConfigError: .*got adapter 'default' with rotations in a row \(stages\)"),
        (
            "inputs",
            r"ConfigError: .*q_proj: got an adapter that rotates the layer's input \(input_stages\); wanted outputs",
        ),
        ("mesh", "ConfigError: got no mesh for a model that is whole"),
        ("plan", r"ConfigError: got a plan \(nothing.\*\) that fits no linear layer"),
        ("again", "ConfigError: got a mesh or a plan for a model that is tensor parallel already"),
        ("plain", "AdapterError: got a LlamaForCausalLM without RoAd layers"),
        ("merge", r"MergeError: got a weight that several processes share \(a DTensor\)"),
        ("blocks", r"ConfigError: got blocks \['Block'\], of which the model has none"),
        (
            "other",
            r"AdapterError: .*got road_2 with group sizes \(8,\) and 32 values; wanted road_1 with \(8,\) and 16",
        ),
        (
            "fewer",
            "AdapterError: got an adapter that differs from 'default' in the layers model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(what: str, message: str, done: Path) -> None:
    for rank in range(2):
        said = json.loads((done / f"refused-{rank}.json").read_text())
        assert len(said) == 11
        assert re.match(message, said[what]), said[what]
