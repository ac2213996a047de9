"""Weights that are not simply the layer's own: tied to the embeddings, or kept elsewhere by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import roadie
from roadie.errors import MergeError
from roadie.testing import randomise, tiny_llama

IDS = torch.arange(3 * 6).reshape(3, 6) * 7 % 128
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_place = pytest.mark.parametrize("place", ["cpu", "disk"])


def _llama(**settings: Any) -> Any:
    return tiny_llama(initializer_range=0.2, **settings)


def _adapted(base: Any, *targets: str, **settings: Any) -> Any:
    config = roadie.RoadConfig(target_modules=list(targets), group_size=16, task_type="CAUSAL_LM", **settings)
    return randomise(roadie.get_peft_model(base, config)).eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _assert_as_near_as_rounding(got: Tensor, wanted: Tensor) -> None:
    """A merge rounds each weight once more; the layers behind add to it. Far below what the adapter changes."""
    share = 1e-5 if got.dtype == torch.float32 else 0.05
    assert (got - wanted).abs().max() <= share * wanted.abs().max()


# --- tied embeddings ----------------------------------------------------------------------------------------------


def _tied(dtype: torch.dtype = torch.float32) -> Any:
    model = _llama(tie_word_embeddings=True, dtype=dtype)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@every_dtype
def test_a_tied_head_is_rotated_and_the_embeddings_are_not(dtype: torch.dtype) -> None:
    model, plain = _adapted(_tied(dtype), "lm_head"), _logits(_tied(dtype))
    layer = model.base_model.model.lm_head
    wanted = plain.double() @ layer.get_delta_weight("default").double().T
    _assert_as_near_as_rounding(_logits(model), wanted.to(dtype))
    assert layer.get_base_layer().weight is model.get_input_embeddings().weight


@every_dtype
def test_merging_unties_with_a_warning_and_unmerging_ties_again(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = _adapted(_tied(dtype), "lm_head", "q_proj")
    head, embeddings = model.base_model.model.lm_head.get_base_layer(), model.get_input_embeddings()
    before, wanted = embeddings.weight.detach().clone(), _logits(model)
    for _ in range(2):
        caplog.clear()
        model.merge_adapter()
        assert "untied" in caplog.text
        assert torch.equal(embeddings.weight, before), "the embeddings were rotated"
        assert not torch.equal(head.weight, before)
        _assert_as_near_as_rounding(_logits(model), wanted)
        model.unmerge_adapter()
        assert head.weight is embeddings.weight
        assert torch.equal(embeddings.weight, before)


@every_dtype
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merged_tied_model_is_untied_and_loads_as_a_plain_one(
    dtype: torch.dtype, safe_merge: bool, tmp_path: Path
) -> None:
    model = _adapted(_tied(dtype), "lm_head", "q_proj")
    wanted = _logits(model)
    whole = model.merge_and_unload(safe_merge=safe_merge)
    assert whole.lm_head.weight is not whole.get_input_embeddings().weight
    assert whole.config.tie_word_embeddings is False
    _assert_as_near_as_rounding(_logits(whole), wanted)
    whole.save_pretrained(tmp_path)
    _assert_as_near_as_rounding(_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)), wanted)


def test_a_tied_model_whose_head_is_not_adapted_stays_tied() -> None:
    model = _adapted(_tied(), "q_proj")
    wanted = _logits(model)
    whole = model.merge_and_unload()
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    _assert_as_near_as_rounding(_logits(whole), wanted)


def test_the_adapter_of_a_tied_head_is_saved_and_loaded(tmp_path: Path) -> None:
    model = _adapted(_tied(), "lm_head")
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(roadie.PeftModel.from_pretrained(_tied(), tmp_path)), _logits(model))


def test_all_linear_leaves_a_tied_head_alone() -> None:
    model = roadie.get_peft_model(_tied(), roadie.RoadConfig(target_modules="all-linear", group_size=16))
    assert not isinstance(model.base_model.model.lm_head, roadie.RoadLayer)


def test_a_tied_head_with_its_input_is_untied_merged_and_tied_again() -> None:
    model = _adapted(_tied(), "lm_head", input_stages=[64])
    head, embeddings = model.base_model.model.lm_head.get_base_layer(), model.get_input_embeddings()
    before, wanted = embeddings.weight.detach().clone(), _logits(model)
    model.merge_adapter()
    assert torch.equal(embeddings.weight, before), "the embeddings were rotated"
    _assert_as_near_as_rounding(_logits(model), wanted)
    model.unmerge_adapter()
    assert head.weight is embeddings.weight


# --- offloaded by accelerate --------------------------------------------------------------------------------------


def _offloaded(place: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = _llama(dtype=dtype)
    if place == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


@every_dtype
@every_place
def test_an_offloaded_model_is_adapted_where_it_computes(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _adapted(_offloaded(place, tmp_path, dtype), "q_proj", "down_proj")
    devices = {("road_" in name, parameter.device.type) for name, parameter in model.named_parameters()}
    assert devices == {(True, "cpu"), (False, "meta")}
    wanted = _logits(_adapted(_llama(dtype=dtype), "q_proj", "down_proj"))
    assert torch.equal(_logits(model), wanted)
    model.save_pretrained(tmp_path / "adapter")
    again = roadie.PeftModel.from_pretrained(_offloaded(place, tmp_path, dtype), tmp_path / "adapter")
    assert torch.equal(_logits(again), wanted)


@pytest.mark.filterwarnings("ignore:this adapter has")
@every_place
def test_an_offloaded_model_rotates_inputs_where_it_computes(place: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"input_stages": [2, 64]}
    model, plain = (
        _adapted(base, "q_proj", "down_proj", **settings)
        for base in (_offloaded(place, tmp_path, torch.bfloat16), _llama(dtype=torch.bfloat16))
    )
    devices = {("road_input" in name, p.device.type) for name, p in model.named_parameters() if "road_" in name}
    assert devices == {(True, "cpu"), (False, "cpu")}
    wanted = _logits(plain)
    for _ in range(2):
        assert torch.equal(_logits(model), wanted)
    model.save_pretrained(tmp_path / "adapter")
    again = roadie.PeftModel.from_pretrained(_offloaded(place, tmp_path, torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(_logits(again), wanted)
    for one in (model, plain):
        one.merge_adapter()
    assert torch.equal(_logits(model), _logits(plain))
    assert not torch.equal(_logits(model), wanted)
    for one in (model, plain):
        one.unmerge_adapter()
    assert torch.equal(_logits(model), wanted)


@every_place
def test_an_offloaded_model_is_trained_as_a_plain_one(place: str, tmp_path: Path) -> None:
    gradients = []
    for base in (_llama(), _offloaded(place, tmp_path)):
        model = _adapted(base, "q_proj").train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "road_" in name])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_dtype
@every_place
@pytest.mark.parametrize("safe_merge", [False, True])
def test_offloaded_layers_are_merged_through_their_hooks(
    place: str, dtype: torch.dtype, safe_merge: bool, tmp_path: Path
) -> None:
    model = _adapted(_offloaded(place, tmp_path, dtype), "q_proj", "down_proj")
    merged = _adapted(_llama(dtype=dtype), "q_proj", "down_proj")
    wanted = _logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    merged.merge_adapter()
    assert torch.equal(_logits(model), _logits(merged))
    model.unmerge_adapter()
    merged.unmerge_adapter()
    assert torch.equal(_logits(model), _logits(merged))
    if dtype == torch.bfloat16:
        assert torch.equal(_logits(model), wanted)
    assert torch.equal(_logits(model.merge_and_unload(safe_merge=safe_merge)), _logits(merged.merge_and_unload()))


def test_a_layer_that_is_not_in_memory_refuses_to_merge_by_itself(tmp_path: Path) -> None:
    layer = _adapted(_offloaded("cpu", tmp_path), "q_proj").base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(MergeError, match="offloaded by accelerate"):
        layer.merge()
    assert not layer.merged
