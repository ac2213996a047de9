"""Stacked experts against the plain model whose weights were multiplied by dense rotation matrices in float64.

Four families: with and without biases, ``[E, D, in]`` and ``[E, in, D]``, gate and up end to end and in turns; each by every
implementation of transformers that roadie computes. tests/families has more families, by one implementation.
"""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families.checks import BOUND, EXPERTS, Adapted, logits, loss, truth
from tests.families.models import FAMILIES, ROWS, TOKENS, Family
from tests.versions import needs_stacked_experts
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import roadie
from roadie.bank.live import live_adapter
from roadie.errors import AdapterError, CheckpointError, ConfigError, MergeError, UnsupportedLayer
from roadie.experts.forward import AdaptedConfig
from roadie.lora import to_lora
from roadie.testing import stock_peft
from roadie.testing.accuracy import relative_error
from roadie.testing.models import randomise
from roadie.tuner import train_only
from roadie.tuner.experts import RoadExperts

pytestmark = needs_stacked_experts

KINDS = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
BASE = "__base__"


def family(kind: str) -> Family:
    return next(each for each in FAMILIES if each.kind == kind)


@cache
def of_truth(kind: str) -> Adapted:
    """In float64 and eager, to compare with."""
    return Adapted.of(family(kind), with_experts=True)


def adapted(kind: str, implementation: str = "grouped_mm") -> Any:
    """The same model, adapted alike, in float32, by another implementation."""
    model = Adapted.of(family(kind), with_experts=True).model.float()
    model.get_base_model().set_experts_implementation(implementation)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    return [module for path, module in model.named_modules() if path.endswith(".experts")]


def outputs(kind: str, model: Any, **arguments: Any) -> Tensor:
    batch = family(kind).inputs(ROWS, TOKENS)
    return logits(model(**batch, **arguments))


def parameters_of(model: Any, name: str) -> dict[str, nn.Parameter]:
    return Adapted(family("qwen3_moe"), model).parameters(name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_rotated_weights(kind: str, implementation: str) -> None:
    model = adapted(kind, implementation)
    for name in EXPERTS:
        model.set_adapter(name)
        wanted, of_parameters = truth(of_truth(kind), name)
        parameters = parameters_of(model, name)
        assert any("road_down" in path for path in parameters)
        got = outputs(kind, model)
        gradients = torch.autograd.grad(loss(got.double()), list(parameters.values()))
        assert got.dtype == torch.float32
        assert relative_error(got.detach(), wanted) <= BOUND
        assert all(gradient.any() for gradient in gradients)
        of_all = [torch.cat([part.flatten() for part in parts]) for parts in (gradients, of_parameters.values())]
        assert relative_error(*of_all) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_rows_are_their_rows_one_by_one_in_training_too(kind: str, implementation: str) -> None:
    model = adapted(kind, implementation)
    names = ["second", "first", BASE]
    parameters = {name: parameters_of(model, name) for name in EXPERTS}
    leaves = [leaf for of_one in parameters.values() for leaf in of_one.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    mixed = outputs(kind, model, adapter_names=names)
    rows = loss(torch.cat([mixed[row : row + 1] for row in range(2)]).double())
    together = torch.autograd.grad(rows, leaves)
    alone = []
    for name in EXPERTS:
        model.set_adapter(name)
        got = outputs(kind, model)
        assert relative_error(mixed[names.index(name)].detach(), got[names.index(name)].detach()) <= BOUND
        chosen = torch.stack([got[row] if names[row] == name else mixed[row].detach() for row in range(2)])
        alone += torch.autograd.grad(loss(chosen.double()), list(parameters[name].values()))
    assert relative_error(*(torch.cat([part.flatten() for part in parts]) for parts in (together, alone))) <= BOUND
    with torch.no_grad(), model.disable_adapter():
        assert relative_error(mixed[2].detach(), outputs(kind, model)[2]) <= BOUND
    with torch.no_grad():
        inference = outputs(kind, model, adapter_names=names)
        blended = outputs(kind, model, adapter_names=[{"first": 0.5}, "first", None])
    assert relative_error(inference, mixed.detach()) <= BOUND
    assert relative_error(blended[1:], inference[1:]) <= BOUND
    assert relative_error(blended[0], inference[0]) > BOUND


def test_a_slot_for_each_token_reaches_its_experts() -> None:
    model = adapted("qwen3_moe")
    batch = family("qwen3_moe").inputs(ROWS, TOKENS)
    slots = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    slots[:, TOKENS // 2 :] = 1
    with torch.no_grad():
        with roadie.rows(model, slots):
            mixed = logits(model(**batch))
        first = outputs("qwen3_moe", model, adapter_names=["first"] * ROWS)
    # Causal: the first half of the tokens sees nothing of the second.
    assert relative_error(mixed[:, : TOKENS // 2], first[:, : TOKENS // 2]) <= BOUND
    assert relative_error(mixed[:, TOKENS // 2 :], first[:, TOKENS // 2 :]) > 100 * BOUND


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_the_base_model_and_the_base_is_left_as_it_was(kind: str, implementation: str) -> None:
    base: Any = family(kind).model().float()
    base.set_experts_implementation(implementation)
    config = experts_of(base)[0].config
    batch = family(kind).inputs(ROWS, TOKENS)
    with torch.no_grad():
        before = logits(base(**batch))
        model = roadie.get_peft_model(base, of_experts("each", target_modules=[]))
        assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * len(experts_of(base))
        assert relative_error(logits(model(**batch)), before) <= BOUND
        with model.disable_adapter():
            assert torch.equal(logits(model(**batch)), before)
        assert base.config._experts_implementation == implementation
        plain = model.unload()
        assert torch.equal(logits(plain(**batch)), before)
    assert all(experts.config is config and "road" not in " ".join(experts._modules) for experts in experts_of(plain))


def of_experts(kind: str | None, **settings: Any) -> roadie.RoadConfig:
    return roadie.RoadConfig(
        **{
            "target_modules": "all-linear",
            "group_size": 4,
            "adapt_group_size": True,
            "target_experts": kind,
            **settings,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_rotates_the_weights_and_unmerging_gives_them_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, "eager").to(dtype)
    model.base_model.set_exact_unmerge("always")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in EXPERTS:
        model.set_adapter(name)
        with torch.no_grad():
            unmerged = outputs(kind, model)
            model.merge_adapter(safe_merge=True)
            merged = outputs(kind, model)
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        assert len([key for key in changed if "experts.gate_up_proj" in key]) >= len(experts_of(model))
        if dtype is torch.float32:
            assert relative_error(merged, unmerged) <= BOUND
        with pytest.raises(ValueError, match="merged adapters"):
            outputs(kind, model, adapter_names=[name] * ROWS)
        model.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merge_and_unload_says_the_same_by_every_implementation() -> None:
    for implementation in IMPLEMENTATIONS:
        model = adapted("gpt_oss", implementation)
        model.set_adapter("first")
        with torch.no_grad():
            wanted = outputs("gpt_oss", model)
            plain = model.merge_and_unload()
            assert relative_error(outputs("gpt_oss", plain), wanted) <= BOUND
        assert not [name for name, _ in plain.named_modules() if "road_" in name]
        assert not isinstance(experts_of(plain)[0].config, AdaptedConfig)


def test_a_merge_that_fails_leaves_all_experts_as_they_were() -> None:
    model = adapted("qwen3_moe")
    model.set_adapter("first")
    with torch.no_grad():
        experts_of(model)[-1].down_proj[0, 0, 0] = float("inf")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:this adapter has")
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_files_have_one_layout_and_stock_peft_refuses_them(kind: str, tmp_path: Any) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.experts"
    experts = experts_of(model)[0]
    number, hidden, width = len(experts.down_proj), 32, experts.gate_up_proj.shape[1:].numel() // 64
    assert tensors[f"{path}.road_gate_up.road_theta"].shape == (number * width,)
    assert tensors[f"{path}.road_down.road_alpha"].shape == (number * hidden // 2,)
    shared = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert shared[f"{path}.road_gate_up_shared.road_theta"].shape == (2 * width,)
    again: Any = peft.PeftModel.from_pretrained(family(kind).model().float(), tmp_path / "first", "first")
    again.load_adapter(tmp_path / "second", "second")
    for name in EXPERTS:
        for each in (model, again):
            each.set_adapter(name)
        with torch.no_grad():
            assert relative_error(outputs(kind, again), outputs(kind, model)) <= BOUND
        value = roadie.checkpoint.load(tmp_path / name)
        roadie.checkpoint.save(value, tmp_path / "copy")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / name / file).read_bytes()
    base = family(kind).model()
    with stock_peft(), pytest.raises(ValueError, match="Invalid variant roadie-experts:road_1"):
        peft.PeftModel.from_pretrained(base, tmp_path / "first")


@pytest.mark.filterwarnings("ignore:this adapter has")
def test_a_file_whose_config_says_otherwise_is_refused(tmp_path: Any) -> None:
    adapted("qwen3_moe").save_pretrained(tmp_path)
    value = roadie.checkpoint.load(tmp_path / "first")
    for told in ("shared", None):
        odd = roadie.Adapter(value.layers, {**value.config, "target_experts": told})
        with pytest.raises(CheckpointError, match="target_experts"):
            roadie.checkpoint.save(odd, tmp_path / "odd")
    linear = {path: layer for path, layer in value.layers.items() if "experts" not in path}
    with pytest.raises(CheckpointError, match="no rotations of experts"):
        roadie.checkpoint.save(roadie.Adapter(linear, value.config), tmp_path / "odd")


def test_adapters_are_switched_and_deleted_as_at_layers() -> None:
    kind = "mixtral"
    model = adapted(kind)
    model.set_adapter("second")
    with torch.no_grad():
        second = outputs(kind, model)
        model.base_model.set_adapter(["first", "second"])
        both = outputs(kind, model)
        model.merge_adapter()
        assert relative_error(outputs(kind, model), both) <= BOUND
        model.unmerge_adapter()
        assert relative_error(outputs(kind, model), both) <= BOUND
        model.merge_adapter(["second"])
        model.merge_adapter(["first"])
        model.unmerge_adapter()
        model.delete_adapter("first")
        model.set_adapter("second")
        assert relative_error(outputs(kind, model), second) <= BOUND
        sites = [m for m in model.modules() if isinstance(m, RoadExperts)]
        assert all("first" not in site.road_theta for site in sites)
        model.add_adapter("third", of_experts("each"))
        model.set_adapter("third")
        with model.disable_adapter():
            base = outputs(kind, model)
        assert relative_error(outputs(kind, model), base) <= BOUND


def test_a_copy_of_an_adapted_model_is_a_model_of_its_own() -> None:
    model = adapted("qwen3_moe")
    model.set_adapter("first")
    with torch.no_grad():
        wanted = outputs("qwen3_moe", model)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(outputs("qwen3_moe", made), wanted)
            randomise(made, seed=5)
            assert not torch.equal(outputs("qwen3_moe", made), wanted)
            assert experts_of(made)[0].config.adapted is made.config
        assert torch.equal(outputs("qwen3_moe", model), wanted)


def test_an_implementation_may_be_chosen_later() -> None:
    model = adapted("gpt_oss", "eager")
    model.set_adapter("first")
    with torch.no_grad():
        wanted = outputs("gpt_oss", model)
        for implementation in IMPLEMENTATIONS:
            model.get_base_model().set_experts_implementation(implementation)
            assert relative_error(outputs("gpt_oss", model), wanted) <= BOUND
        model.get_base_model().config._experts_implementation = "sonicmoe"
        with pytest.raises(UnsupportedLayer, match="got experts_implementation='sonicmoe'"):
            outputs("gpt_oss", model)


def test_layers_and_exclusions_hold_for_experts_too() -> None:
    for settings in ({"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.mlp.experts"]}):
        model = roadie.get_peft_model(family("qwen3_moe").model(), of_experts("each", **settings))
        sites = [path for path, module in model.named_modules() if isinstance(module, RoadExperts)]
        assert sites
        assert all("layers.1." in path for path in sites)
    patterns = {"variant_pattern": {"road_down": "road_4"}, "group_size_pattern": {"experts.road_gate_up": 8}}
    model = roadie.get_peft_model(family("qwen3_moe").model(), of_experts("each", **patterns))
    down, gate_up = (experts_of(model)[0]._modules[name] for name in ("road_down", "road_gate_up"))
    assert (down.variant["default"], down.stages["default"]) == ("road_4", (4,))
    assert (gate_up.variant["default"], gate_up.stages["default"]) == ("road_1", (8,))


def refused(model: Any, match: str, **settings: Any) -> None:
    before = set(model.state_dict())
    with pytest.raises((UnsupportedLayer, ConfigError), match=match):
        roadie.get_peft_model(model, of_experts("each", **settings))
    assert set(model.state_dict()) == before
    assert not [module for module in model.modules() if isinstance(getattr(module, "config", None), AdaptedConfig)]


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    refused(family("llama4_text").model(), "feed_forward.experts.*Llama4TextExperts.*registry")
    refused(family("llama").model(), "no stacked experts")
    too_large = {"target_modules": [], "group_size": 64, "adapt_group_size": False}
    refused(family("qwen3_moe").model(), "group_size=64 for the 32 outputs of the gate", **too_large)
    model: Any = family("gpt_oss").model()
    model.config._experts_implementation = "deepgemm"
    refused(model, "experts_implementation='deepgemm'.*set_experts_implementation")
    model = family("gpt_oss").model()
    model._use_kernels = True
    refused(model, "use_kernels")
    model = family("qwen3_moe").model()
    experts_of(model)[0]._is_expert_parallel = True
    refused(model, "several processes")
    with pytest.raises(ConfigError, match="got target_experts 'all'; wanted 'each', 'shared'"):
        of_experts("all")


def test_quantised_experts_are_refused_by_name() -> None:
    of_class = r"layers\.0\.mlp\.experts.*got experts of class {} with gate_up_proj of {}.*load the model dequantised"
    model: Any = family("qwen3_moe").model()
    replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config(), pre_quantized=True)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    refused(model, of_class.format("FP8Experts", "torch.float8_e4m3fn"))
    model = family("gpt_oss").model()
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    refused(model, of_class.format("Mxfp4GptOssExperts", "torch.uint8"))
    for layer in model.model.layers:  # loaded, the weights are objects of kernels, and no parameters
        for name in ("gate_up_proj", "down_proj"):
            del layer.mlp.experts._parameters[name]
            setattr(layer.mlp.experts, name, SimpleNamespace())
    refused(model, of_class.format("Mxfp4GptOssExperts", "class SimpleNamespace"))
    with (
        roadie.AdapterBank(model, slots=2) as bank,
        pytest.raises(AdapterError, match=r"Mxfp4GptOssExperts.*dequantised"),
    ):
        bank.admit("a", live_adapter(adapted("gpt_oss"), "first"))


def test_experts_that_an_older_transformers_does_not_describe_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registry, where it has one, says neither whether gate and up are in turns nor what else a rotation must know."""
    model: Any = family("qwen3_moe").model()
    for experts in experts_of(model):
        del experts.is_concatenated
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    refused(model, r"layers\.0\.mlp\.experts.*got experts of class Qwen3MoeExperts.*in transformers 5\.17 or newer")


def test_inputs_of_experts_are_left_alone_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"target_modules": ["q_proj"], "input_stages": [4]}
    with caplog.at_level(logging.WARNING, "roadie"):
        model = roadie.get_peft_model(family("qwen3_moe").model(), of_experts("each", **settings))
    assert (
        "the inputs of stacked experts alone, such as that of model.layers.0.mlp.experts.road_gate_up (4 in"
        in caplog.text
    )
    inputs = {path.rpartition(".")[0] for path, _ in model.named_modules() if path.endswith(".road_input")}
    assert {path.rpartition(".")[2] for path in inputs} == {"q_proj"}
    settings = {"target_modules": ["q_proj"], "input_stages_pattern": {"experts.road_down": [4]}}
    with pytest.warns(RuntimeWarning, match=r"input_stages_pattern keys did not match any.*\['experts\.road_down'\]"):
        roadie.get_peft_model(family("qwen3_moe").model(), of_experts("each", **settings))


def test_what_does_not_take_such_adapters_says_so() -> None:
    model = adapted("qwen3_moe")
    value = live_adapter(model, "first")
    with pytest.raises(AdapterError, match="to_lora: got a rotation of stacked experts"):
        to_lora(value, family("qwen3_moe").model(), 8)
    with (
        pytest.raises(AdapterError, match="train_only: got a rotation of stacked experts"),
        train_only(model, "1/2", "first"),
    ):
        pass
    other = live_adapter(model, "second")
    with pytest.raises(AdapterError, match="some rotate each expert and others share"):
        roadie.compose(value, other)
    for name in EXPERTS:
        value = live_adapter(model, name)
        squared = roadie.compose(value, value)
        assert squared.config["target_experts"] == EXPERTS[name]
        assert roadie.distance(roadie.power(squared, 0.5), value) < 1e-5


def test_adapters_of_a_model_combine_into_another() -> None:
    model = adapted("qwen3_moe")
    model.set_adapter("first")
    with torch.no_grad():
        wanted = outputs("qwen3_moe", model)
        model.add_weighted_adapter(["first"], [0.5], "weak")
        model.add_weighted_adapter(["weak", "weak"], [1.0, 1.0], "again", "compose")
        model.set_adapter("again")
        assert relative_error(outputs("qwen3_moe", model), wanted) <= BOUND
