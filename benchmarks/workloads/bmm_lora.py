"""LoRA for a batch in which each row has an adapter of its own, by batched products: the rival of the paper's figure.

For row b with adapter s the layer gives ``W x_b + scale * B_s (A_s x_b)``. The rows' A and B are gathered once, when the
rows are assigned, and not in every step as the paper's baseline does; the second product adds to the base layer's output
in the same kernel (baddbmm). So this is LoRA as fast as plain torch has it.

Legend: N adapters, B rows, T tokens a row, I in features, O out features, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.rivals import RANK


class BmmLoraLinear(nn.Module):
    """A frozen linear layer and N LoRA adapters of it; `assign` says which adapter each row uses."""

    def __init__(self, base: nn.Linear, a_NIr: Tensor, b_NrO: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("a_NIr", a_NIr)
        self.register_buffer("b_NrO", b_NrO)
        self.a_BIr, self.b_BrO = a_NIr[:0], b_NrO[:0]

    def assign(self, rows_B: Tensor) -> None:
        """Row b uses adapter ``rows_B[b]`` from now on."""
        self.a_BIr, self.b_BrO = self.a_NIr[rows_B], self.b_NrO[rows_B]

    def forward(self, x_BTI: Tensor) -> Tensor:
        """``[B, T, I]`` to ``[B, T, O]``; the scale is in b."""
        return torch.baddbmm(self.base(x_BTI), torch.bmm(x_BTI, self.a_BIr), self.b_BrO)


def add_bmm_lora(model: nn.Module, targets: Sequence[str], adapters: int, rank: int = RANK) -> nn.Module:
    """Replace the modules called `targets` (in place) by LoRA layers with `adapters` random adapters; scale 2, as LoRA's."""
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in targets and isinstance(module, nn.Linear):
            a_NIr = torch.randn(adapters, module.in_features, rank, generator=generator) * module.in_features**-0.5
            b_NrO = torch.randn(adapters, rank, module.out_features, generator=generator) * 0.02 * 2
            layer = BmmLoraLinear(module, *(tensor.to(module.weight) for tensor in (a_NIr, b_NrO)))
            setattr(model.get_submodule(parent), own, layer)
    return model


def assign(model: nn.Module, rows_B: Tensor) -> None:
    """Tell every LoRA layer of `model` which adapter each row uses."""
    for module in model.modules():
        if isinstance(module, BmmLoraLinear):
            module.assign(rows_B)
