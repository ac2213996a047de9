"""Models with many adapters, and a decoding step in which rows use different ones: what the paper's figure (4) is made of.

All adapters are frozen, and in the dtype of the base, since PEFT's RoAd cannot mix adapters of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import nn

import roadie
from benchmarks.harness import Run
from benchmarks.rivals import FROZEN, GROUP_SIZE, PEFT_LORA, PEFT_ROAD, RANK, ROADIE, sharing_copy
from benchmarks.workloads.bmm_lora import add_bmm_lora, assign
from benchmarks.workloads.decoding import static_step
from benchmarks.workloads.model import TARGETS
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

BMM_LORA = "LoRA r=8 by bmm"


def models(base: nn.Module, count: int) -> dict[str, nn.Module]:
    """The rivals, each with `count` adapters called a0, a1 ..., over the weights of `base`."""
    base.requires_grad_(False)
    names = (BMM_LORA, ROADIE, PEFT_ROAD, PEFT_LORA)
    return {FROZEN: base, **{name: with_adapters(base, name, TARGETS, count) for name in names}}


def with_adapters(base: nn.Module, name: str, targets: Any, count: int) -> nn.Module:
    """roadie's, PEFT's RoAd or a LoRA, with `count` frozen adapters called a0, a1 ... of the modules `targets`.

    Their values are random, and equal for equal arguments.
    """
    if name == BMM_LORA:
        return add_bmm_lora(sharing_copy(base), targets, count)
    road = {"variant": "road_1", "group_size": GROUP_SIZE, "target_modules": targets, "init_weights": False}
    if name == ROADIE:
        made = _with_adapters(sharing_copy(base), roadie.RoadConfig(**road), roadie.get_peft_model, count)
        assert not is_stock(made)
        return made
    if name == PEFT_ROAD:
        with stock_peft() as config:
            made = _with_adapters(sharing_copy(base), config(**road), peft.get_peft_model, count)
        assert is_stock(made)
        return made
    assert name == PEFT_LORA, name
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, init_lora_weights=False)
    return _with_adapters(sharing_copy(base), lora, peft.get_peft_model, count)


def _with_adapters(model: Any, config: Any, get_peft_model: Any, count: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
        for index in range(1, count):
            adapted.add_adapter(f"a{index}", config, autocast_adapter_dtype=False)
    return adapted.requires_grad_(False).eval()


def step(name: str, model: nn.Module, rows: Sequence[int], context: int, *, named: bool) -> Run:
    """One token a row, with `context` tokens in the cache, row b in adapter ``rows[b]``.

    named: by `adapter_names` in every step; else the rows are what the model was told before, if it was.
    """
    if name == BMM_LORA:
        assign(model, torch.tensor(rows, device=next(model.parameters()).device))
    arguments = {"adapter_names": [f"a{row}" for row in rows]} if named and name != FROZEN else {}
    return static_step(model, len(rows), context, **arguments)
