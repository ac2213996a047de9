"""The paper's figure (4): decoding a batch in which rows use different adapters, against how many different ones there are.

The number of rows stays; with N adapters row b uses adapter ``b mod N``. All adapters are in the dtype of the base, since
PEFT's RoAd cannot mix adapters of another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
from torch import nn

import roadie
from benchmarks.harness import Budget, Run, measure
from benchmarks.rivals import FROZEN, GROUP_SIZE, PEFT_LORA, PEFT_ROAD, RANK, ROADIE, sharing_copy
from benchmarks.workloads import entry
from benchmarks.workloads.bmm_lora import add_bmm_lora, assign
from benchmarks.workloads.decoding import static_step
from benchmarks.workloads.model import TARGETS
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

BMM_LORA = "LoRA r=8 by bmm"


@dataclass(frozen=True)
class AdaptersCase:
    """A batch of `rows` with `adapters` different adapters; `context`: tokens in the cache; `layers`: decoder layers."""

    adapters: int
    rows: int
    context: int
    layers: int


def models(base: nn.Module, count: int) -> dict[str, nn.Module]:
    """The rivals, each with `count` adapters called a0, a1 ..., over the weights of `base`."""
    base.requires_grad_(False)
    made = {name: with_adapters(base, name, TARGETS, count) for name in (ROADIE, PEFT_ROAD, PEFT_LORA)}
    return {FROZEN: base, BMM_LORA: add_bmm_lora(sharing_copy(base), TARGETS, count), **made}


def with_adapters(base: nn.Module, name: str, targets: Any, count: int) -> nn.Module:
    """roadie's, PEFT's RoAd or PEFT's LoRA, with `count` frozen adapters called a0, a1 ... of the modules `targets`.

    Their values are random, and equal for equal arguments.
    """
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


def run(case: AdaptersCase, budget: Budget, rivals: dict[str, nn.Module], synchronise: Run | None) -> dict[str, Any]:
    """Time one decoding step of each rival."""
    rounds = measure({name: _step(name, model, case) for name, model in rivals.items()}, budget, synchronise)
    return entry("adapters", asdict(case), rounds, base=FROZEN, ours=ROADIE, bytes_moved=0)


def _step(name: str, model: nn.Module, case: AdaptersCase) -> Run:
    rows = [index % case.adapters for index in range(case.rows)]
    if name == BMM_LORA:
        assign(model, torch.tensor(rows, device=next(model.parameters()).device))
    named = name in (ROADIE, PEFT_ROAD, PEFT_LORA)
    arguments = {"adapter_names": [f"a{row}" for row in rows]} if named else {}
    return static_step(model, case.rows, case.context, **arguments)


def counts(rows: int) -> Iterable[int]:
    """1, 2, 4 ... up to the number of rows."""
    return (2**power for power in range(rows.bit_length()) if 2**power <= rows)
