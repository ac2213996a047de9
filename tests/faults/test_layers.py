"""Faults of stock PEFT in the kinds of layers it adapts and in what PEFT's own helpers ask of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from roadie.testing import randomise, tiny_llama

IDS = torch.arange(10).reshape(2, 5)


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)).eval()


UNSUPPORTED = r"Target module Conv1D\(.*\) is not supported"


def test_the_default_targets_of_gpt2(fault: Any) -> None:
    def check(implementation: Any) -> None:
        base = _gpt2()
        plain = base(IDS).logits
        model = implementation.adapt(base, group_size=16).eval()
        layers = [m for m in model.modules() if hasattr(m, "road_theta")]
        assert {type(layer.get_base_layer()) for layer in layers} == {Conv1D}
        torch.testing.assert_close(model(IDS).logits, plain)
        randomise(model)
        changed = model(IDS).logits
        assert (changed - plain).abs().max() > 1e-2
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, changed)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS).logits, changed)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, changed)

    with torch.no_grad():
        fault(check, on_stock=ValueError, match=UNSUPPORTED)


def test_all_linear_on_gpt2(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt(_gpt2(), target_modules="all-linear", group_size=16)
        assert sum(hasattr(m, "road_theta") for m in model.modules()) == 8

    fault(check, on_stock=ValueError, match=UNSUPPORTED)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_conv1d_computes_what_the_same_linear_layer_does(fault: Any, variant: str) -> None:
    def check(implementation: Any) -> None:
        torch.manual_seed(0)
        conv, linear = Conv1D(32, 24), nn.Linear(24, 32)
        with torch.no_grad():
            conv.bias.normal_()
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
        settings = {"target_modules": ["0"], "group_size": 8, "variant": variant}
        models = [implementation.adapt_many(nn.Sequential(base), ["a", "b"], **settings) for base in (linear, conv)]
        x = torch.randn(3, 5, 24)
        for arguments in ({}, {"adapter_names": ["b", "__base__", "a"]}):
            wanted, got = (model(x, **arguments) for model in models)
            torch.testing.assert_close(got, wanted)

    fault(check, on_stock=ValueError, match=UNSUPPORTED)


def test_disable_input_dtype_casting(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(tiny_llama(dtype=torch.bfloat16), ["default"], group_size=16)
        wanted = model(IDS).logits
        with disable_input_dtype_casting(model):
            got = model(IDS).logits
        assert torch.equal(got, wanted)
        assert torch.equal(model(IDS).logits, wanted)

    with torch.no_grad():
        fault(check, on_stock=AttributeError, match="cast_input_dtype_enabled")
