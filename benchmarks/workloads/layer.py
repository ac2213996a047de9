"""One linear layer: forward without gradients, and forward with backward, against the frozen layer.

The frozen layer computes the gradient of its input in backward, as it does inside a model whose first layers are adapted
too; the adapted layers compute that and the gradients of their adapters. Layers are called as their parent model calls
them, without PeftModel's own few microseconds.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.rivals import FROZEN, PRECISIONS, RIVALS, ROADIE, ROADIE_TRAINABLE, layer_of, random_weight
from benchmarks.workloads import entry

FORWARD, TRAINING = "forward", "forward+backward"
INFERENCE = "forward, adapters frozen"
# Elements read and written for each element of the output, by the rotation as a pass of its own over memory:
# forward y in, z out; backward g and the kept tensor in, the input's gradient out.
PASSES = {FORWARD: 2, INFERENCE: 2, TRAINING: 5}


@dataclass(frozen=True)
class LayerCase:
    """One size of one layer; precision: a name of `rivals.PRECISIONS`."""

    mode: str
    precision: str
    out_features: int
    tokens: int
    in_features: int = 4096


def run(case: LayerCase, budget: Budget, names: tuple[str, ...] = RIVALS) -> dict[str, Any]:
    """Time the rivals on one thread; the first of `names` must be the frozen layer."""
    assert names[0] == FROZEN
    with threads(1):
        rounds = measure(runs(case, names), budget)
        return entry("layer", asdict(case), rounds, base=FROZEN, ours=ROADIE, bytes_moved=bytes_moved(case))


def bytes_moved(case: LayerCase) -> int:
    """Bytes read and written by rotating the output as a pass of its own."""
    return PASSES[case.mode] * case.tokens * case.out_features * PRECISIONS[case.precision].base.itemsize


def runs(case: LayerCase, names: tuple[str, ...], device: str = "cpu") -> dict[str, Run]:
    """What each rival does once."""
    precision = PRECISIONS[case.precision]
    weight = random_weight(case.out_features, case.in_features, precision.base, device)
    x_TI = torch.randn(1, case.tokens, case.in_features, device=device).to(precision.base)
    grad_TO = torch.randn(1, case.tokens, case.out_features, device=device).to(precision.base)
    if case.mode == TRAINING:
        return {name: training(*layer_of(weight, name, precision), x_TI, grad_TO) for name in names}
    trainable = names if case.mode == FORWARD else (ROADIE_TRAINABLE,)
    return {
        name: (forward if name in trainable else inference)(*layer_of(weight, name, precision), x_TI) for name in names
    }


def forward(layer: nn.Module, parameters: list[nn.Parameter], x_TI: torch.Tensor) -> Run:
    """The layer's forward without gradients."""

    def once() -> torch.Tensor:
        with torch.no_grad():
            return layer(x_TI)

    return once


def inference(layer: nn.Module, parameters: list[nn.Parameter], x_TI: torch.Tensor) -> Run:
    """As `forward`, of an adapter that was loaded for inference: nothing of it requires a gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    return forward(layer, parameters, x_TI)


def training(layer: nn.Module, parameters: list[nn.Parameter], x_TI: torch.Tensor, grad_TO: torch.Tensor) -> Run:
    """The layer's forward and backward: gradients of its input and of its adapter."""
    x_TI = x_TI.clone().requires_grad_()

    def once() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x_TI), [x_TI, *parameters], grad_TO)

    return once
