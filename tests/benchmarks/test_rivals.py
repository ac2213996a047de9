"""The rivals are the real ones, and a wrong one is noticed."""

from __future__ import annotations

import peft
import pytest
import torch
from benchmarks import rivals
from benchmarks.rivals import ADAPTERS, PRECISIONS, RIVALS, check_rival, layer_of, random_weight, sharing_copy
from benchmarks.workloads.adapters import models
from benchmarks.workloads.bmm_lora import BmmLoraLinear, assign
from peft.tuners.ia3.layer import Linear as StockIA3
from peft.tuners.lora.layer import Linear as StockLora
from peft.tuners.road.layer import Linear as StockRoad

import roadie
from roadie.testing import relative_error, tiny_llama

CLASSES = {
    rivals.FROZEN: torch.nn.Linear,
    rivals.ROADIE: roadie.Linear,
    rivals.PEFT_ROAD: StockRoad,
    rivals.PEFT_LORA: StockLora,
    rivals.PEFT_IA3: StockIA3,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RIVALS)
def test_each_rival_is_the_class_its_name_says_over_the_same_weight(name: str, precision: str) -> None:
    weight = random_weight(128, 64, PRECISIONS[precision].base)
    layer, trained = layer_of(weight, name, PRECISIONS[precision])
    assert type(layer) is CLASSES[name]
    assert layer.weight is weight
    assert {parameter.dtype for parameter in trained} == ({PRECISIONS[precision].adapter} if trained else set())
    assert bool(trained) == (name != rivals.FROZEN)
    assert not weight.requires_grad


def test_lora_has_rank_8_and_road_is_road_1() -> None:
    weight = random_weight(128, 64, torch.float32)
    lora, (a, b) = layer_of(weight, rivals.PEFT_LORA, PRECISIONS["fp32"])
    assert lora.r == {"default": 8}
    assert (a.shape, b.shape) == ((8, 64), (128, 8))
    for name in (rivals.ROADIE, rivals.PEFT_ROAD):
        layer, trained = layer_of(weight, name, PRECISIONS["fp32"])
        assert layer.variant == {"default": "road_1"}
        assert [parameter.shape for parameter in trained] == [(64,), (64,)]


def test_ours_and_pefts_road_compute_the_same() -> None:
    weight, x = random_weight(128, 64, torch.float32), torch.randn(3, 64)
    (ours, _), (theirs, _) = (layer_of(weight, name, PRECISIONS["fp32"]) for name in (rivals.ROADIE, rivals.PEFT_ROAD))
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-6
        assert relative_error(ours(x), torch.nn.functional.linear(x, weight)) > 1e-3  # and something


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("claimed", RIVALS)
def test_a_rival_under_another_name_is_noticed(name: str, claimed: str) -> None:
    layer, _ = layer_of(random_weight(128, 64, torch.float32), name, PRECISIONS["fp32"])
    if name == claimed:
        check_rival(layer, claimed, PRECISIONS["fp32"])
        return
    with pytest.raises(AssertionError):
        check_rival(layer, claimed, PRECISIONS["fp32"])


def test_an_adapter_in_another_dtype_is_noticed() -> None:
    layer, _ = layer_of(random_weight(128, 64, torch.bfloat16), rivals.PEFT_LORA, PRECISIONS["bf16"])
    with pytest.raises(AssertionError, match="adapter parameters"):
        check_rival(layer, rivals.PEFT_LORA, PRECISIONS["bf16, fp32 adapter"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_lora_of_another_rank_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "_peft_lora", None)
    monkeypatch.setitem(rivals._MAKERS, rivals.PEFT_LORA, _lora_of_rank_4)
    weight = random_weight(128, 64, torch.float32)
    if name != rivals.PEFT_LORA:
        layer_of(weight, name, PRECISIONS["fp32"])
        return
    with pytest.raises(AssertionError, match="this is not"):
        layer_of(weight, name, PRECISIONS["fp32"])


def _lora_of_rank_4(model, targets, variant, autocast):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


def test_models_share_their_weights_but_not_their_modules() -> None:
    base = tiny_llama()
    copy = sharing_copy(base)
    for (name, one), (_, other) in zip(base.named_parameters(), copy.named_parameters(), strict=True):
        assert one is other, name
    assert {id(module) for module in base.modules()}.isdisjoint(id(module) for module in copy.modules())


def test_lora_by_bmm_computes_what_pefts_lora_computes_row_by_row() -> None:
    rivals_of_three = models(tiny_llama(), 3)
    bmm, stock = rivals_of_three["LoRA r=8 by bmm"], rivals_of_three[rivals.PEFT_LORA]
    _copy_lora(stock, bmm, 3)
    rows, tokens = [2, 0, 1, 0], torch.randint(128, (4, 5))
    assign(bmm, torch.tensor(rows))
    with torch.no_grad():
        wanted = stock(input_ids=tokens, adapter_names=[f"a{row}" for row in rows]).logits
        got = bmm(input_ids=tokens).logits
        plain = rivals_of_three[rivals.FROZEN](input_ids=tokens).logits
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(got, plain) > 1e-3


def _copy_lora(stock: torch.nn.Module, bmm: torch.nn.Module, count: int) -> None:
    theirs = [module for module in stock.modules() if isinstance(module, StockLora)]
    ours = [module for module in bmm.modules() if isinstance(module, BmmLoraLinear)]
    for source, target in zip(theirs, ours, strict=True):
        for index in range(count):
            name = f"a{index}"
            target.a_NIr[index] = source.lora_A[name].weight.detach().T
            target.b_NrO[index] = source.lora_B[name].weight.detach().T * source.scaling[name]
