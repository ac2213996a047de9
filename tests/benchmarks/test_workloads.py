"""Every workload runs at tiny sizes, and counts what it says it counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks import plan
from benchmarks.harness import Budget, threads
from benchmarks.memory import bytes_kept, peak_bytes
from benchmarks.rivals import ADAPTERS, FROZEN, PEFT_IA3, PEFT_LORA, PEFT_ROAD, PRECISIONS, RIVALS, ROADIE, layer_of
from benchmarks.rivals import random_weight as weight_of
from benchmarks.workloads import kept, layer, model, peak, rotation, with_limit
from benchmarks.workloads.decoding import CAN_STEP_BACK, static_step
from benchmarks.workloads.kept import KeptCase
from benchmarks.workloads.layer import FORWARD, LayerCase
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import DECODE, PREFILL, TRAINING, ModelCase
from benchmarks.workloads.rotation import COPY, PEFT_APPLY, PEFT_APPLY_FP32, RotationCase
from packaging.version import Version
from tests.versions import TRANSFORMERS

from roadie.testing import relative_error

FEW = Budget(0, min_rounds=2, max_rounds=2, warm_up_calls=1, shortest_sample_s=0)
TINY = plan.TINY
can_step_back = pytest.mark.skipif(not CAN_STEP_BACK, reason="decoding needs a newer transformers")


def check_times(entry: dict[str, Any], names: tuple[str, ...], base: str) -> None:
    assert tuple(entry["rivals"]) == names
    assert entry["rounds"] == 2
    assert all(rival["median_ms"] > 0 for rival in entry["rivals"].values())
    assert entry["rivals"][base]["ratio"]["value"] == 1
    assert json.loads(json.dumps(entry)) == entry


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [FORWARD, LAYER_TRAINING])
def test_a_layer(mode: str, precision: str) -> None:
    entry = layer.run(LayerCase(mode, precision, out_features=128, tokens=3, in_features=64), FEW)
    check_times(entry, RIVALS, FROZEN)
    assert entry["threads"] == 1
    elements = {FORWARD: 2, LAYER_TRAINING: 5}[mode] * 3 * 128
    assert entry["bytes_moved"] == elements * (4 if precision == "fp32" else 2)


@pytest.mark.parametrize("name", RIVALS)
def test_training_a_layer_gives_the_gradients_of_its_input_and_of_its_adapter(name: str) -> None:
    runs = layer.runs(LayerCase(LAYER_TRAINING, "fp32", 128, 3, 64), (name,))
    gradients = runs[name]()
    _, trained = layer_of(weight_of(128, 64, torch.float32), name, PRECISIONS["fp32"])
    assert [gradient.shape for gradient in gradients] == [(1, 3, 64), *(parameter.shape for parameter in trained)]
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_forward_is_without_gradients() -> None:
    for run in layer.runs(LayerCase(FORWARD, "fp32", 128, 3, 64), RIVALS).values():
        assert not run().requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rotation_alone(precision: str) -> None:
    entry = rotation.run(RotationCase(precision, tokens=2, out_features=128), FEW)
    theirs = (PEFT_APPLY,) if precision == "fp32" else (PEFT_APPLY, PEFT_APPLY_FP32)
    check_times(entry, (COPY, ROADIE, *theirs), COPY)
    assert entry["bytes_moved"] == 2 * 2 * 128 * PRECISIONS[precision].base.itemsize
    assert with_limit(entry, {})["limit_ms"] == entry["rivals"][COPY]["median_ms"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours_and_pefts_rotation_of_the_same_numbers_agree(precision: str) -> None:
    runs = rotation.runs(RotationCase(precision, tokens=2, out_features=128))
    bound = 1e-6 if precision == "fp32" else 2**-7  # PEFT computes in bfloat16: three roundings of 2^-9 each
    assert relative_error(runs[ROADIE](), runs[PEFT_APPLY]()) < bound


@pytest.mark.parametrize("mode", [PREFILL, pytest.param(DECODE, marks=can_step_back), TRAINING])
def test_a_model(mode: str) -> None:
    case = ModelCase(mode, "bf16, fp32 adapter", rows=2, tokens=6, size=TINY)
    entry = model.run(case, FEW, model.rivals_of(case))
    check_times(entry, RIVALS, FROZEN)
    assert ("bytes" in entry) == (mode == TRAINING)
    # q, k, v, o and down have 64 outputs, gate and up 128; two layers.
    outputs, tokens = 2 * (5 * 64 + 2 * 128), 2 if mode == DECODE else 12
    assert entry["bytes_moved"] == (5 if mode == TRAINING else 2) * tokens * outputs * 2
    assert with_limit(entry, {str(entry["threads"]): 1e9})["limit_ms"] > entry["rivals"][FROZEN]["median_ms"]


def test_the_frozen_models_backward_runs_through_every_layer() -> None:
    case = ModelCase(TRAINING, "fp32", rows=1, tokens=4, size=TINY)
    frozen = model.rivals_of(case, (FROZEN,))[FROZEN]
    seen = []
    for index, block in enumerate(frozen.model.layers):
        block.register_full_backward_hook(lambda *_, index=index: seen.append(index))
    (gradient,) = model.training_step(frozen, case)()
    assert seen == [1, 0]
    assert gradient.shape == (1, 4, 64)
    assert bool(gradient.abs().sum() > 0)
    assert not frozen.get_input_embeddings()._forward_hooks  # the hook is gone again


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_training_step_trains_every_parameter_of_the_adapter(name: str) -> None:
    case = ModelCase(TRAINING, "fp32", rows=1, tokens=4, size=TINY)
    gradients = model.training_step(model.rivals_of(case, (name,))[name], case)()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_decoding_steps_back_with_every_transformers_from_5_17_on() -> None:
    assert CAN_STEP_BACK or Version("5.17") > TRANSFORMERS


@can_step_back
def test_a_decoding_step_gives_the_next_tokens_logits_each_time_it_is_called() -> None:
    case = ModelCase(DECODE, "fp32", rows=2, tokens=5, size=TINY)
    frozen = model.rivals_of(case, (FROZEN,))[FROZEN]
    step = static_step(frozen, rows=2, context=5)
    with torch.no_grad():
        wanted = frozen(input_ids=torch.ones(2, 6, dtype=torch.long)).logits[:, -1:]
    for _ in range(3):
        assert relative_error(step(), wanted) < 1e-5


def test_bytes_kept_counts_whole_storages_once_and_no_parameters() -> None:
    weight, x = torch.nn.Parameter(torch.ones(8)), torch.ones(16, 8, requires_grad=True)
    assert bytes_kept(lambda: (x * weight).sum(), [weight]) == 16 * 8 * 4
    assert bytes_kept(lambda: (x * weight).sum(), []) == 16 * 8 * 4 + 8 * 4
    assert bytes_kept(lambda: (x * x).sum(), []) == 16 * 8 * 4
    assert bytes_kept(lambda: (x[:1] * weight).sum(), [weight]) == 16 * 8 * 4  # the view keeps all of x
    assert bytes_kept(lambda: (x * 2).sum(), []) == 0


@pytest.mark.parametrize("what", [kept.LINEAR, kept.SILU, kept.RELU, kept.MLP, kept.BLOCK])
def test_bytes_kept_by_modules(what: str) -> None:
    """Anchors: PEFT's RoAd keeps two float32 tensors of the output's size, (IA)3 at least one tensor, LoRA its input."""
    amounts = kept.run(KeptCase(what, "fp32", width=64, out_features=128, tokens=4))["bytes"]
    assert set(amounts) == {
        *(f"{name} road_{variant}" for name in (ROADIE, PEFT_ROAD) for variant in (1, 2, 4)),
        PEFT_LORA,
        PEFT_IA3,
    }
    if what != kept.BLOCK:
        assert amounts[f"{PEFT_ROAD} road_1"]["per_element"] == 8
        assert amounts[PEFT_IA3]["per_element"] == 4
        sharing = 2 if what == kept.MLP else 1  # gate and up keep one input together, and 8 numbers a token each
        assert amounts[PEFT_LORA]["per_element"] == 4 * (64 / sharing + 8) / 128
    assert 0 <= amounts[f"{ROADIE} road_1"]["per_element"] <= 4


def test_bytes_kept_when_compiled_as_one_graph() -> None:
    case = KeptCase(kept.SILU, "fp32", kept.PARTITIONED, width=64, out_features=128, tokens=4)
    amounts = kept.run(case)["bytes"]
    assert set(amounts) == {f"{ROADIE} road_{variant}" for variant in (1, 2, 4)}
    assert all(0 <= amount["per_element"] <= 4 for amount in amounts.values())


def test_the_peak_of_a_known_allocation() -> None:
    peak_of = peak_bytes(lambda: torch.ones(64 * 2**20, dtype=torch.uint8))
    # The kernel adds up a thread's pages 64 at a time, so a few hundred KiB may be missing.
    assert 63 * 2**20 <= peak_of < 80 * 2**20
    assert peak_bytes(lambda: None) < 8 * 2**20


def test_peaks_in_processes_of_their_own() -> None:
    models = [ModelCase(TRAINING, "fp32", rows=1, tokens=4, size=TINY)]
    layers = [LayerCase(LAYER_TRAINING, "fp32", 1024, tokens=2048, in_features=64)]
    of_layer, of_model = peak.run(models, layers, (ROADIE,))
    assert of_layer["case"]["what"] == "layer"
    assert of_layer["bytes"][ROADIE] >= 1024 * 2048 * 4  # its output, if nothing else
    assert of_model["bytes"][ROADIE] >= 0


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_plans_name_every_workload_once() -> None:
    for tasks in (list(plan.quick()), list(plan.full())):
        titles = [task.title for task in tasks]
        assert len(set(titles)) == len(titles)
        for words in ("rotation alone", "bytes kept", "whole model", "peak memory", "layer forward"):
            assert any(title.startswith(words) for title in titles), words
