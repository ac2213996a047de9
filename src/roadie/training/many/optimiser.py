"""AdamW for many adapters at once: each row of a stack has a learning rate, a step count and a decay of its own.

For each adapter with gradient g, after clipping by the norm over all of its parameters (torch.nn.utils.clip_grad_norm_):

    p <- p (1 - rate decay);  m <- m + (g - m)(1 - b1);  v <- b2 v + (1 - b2) g^2
    p <- p - rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

which is what torch.optim.AdamW does for one adapter alone, with its defaults for b1, b2 and eps. Rows do not meet: what is
not finite in one adapter stays there. Places outside of `Stack.trained` keep their values bit for bit: their gradients and
moments are 0, and they do not decay.

Legend: S adapters of a family; parameters as in `roadie.bank.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.bank.families import Family, Stack

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Rates:
    """What one adapter is told for one step. step: its own, from 1; max_grad_norm: 0 for no clipping."""

    learning_rate: float
    step: int
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


def step(family: Family, rates: Sequence[Rates], squared_norms_S: Tensor) -> None:
    """Change the parameters of a family by its gradients; squared_norms_S: of the gradients, one for each adapter."""
    clip_S1 = _clipping(rates, squared_norms_S)
    columns = _columns(rates, squared_norms_S)
    with torch.no_grad():
        for stack in family.stacks:
            _step_stack(stack, clip_S1, *columns)


def _clipping(rates: Sequence[Rates], squared_norms_S: Tensor) -> Tensor | None:
    """The factor ``[S, 1]`` for the gradients of each adapter; None where nothing is clipped."""
    if not any(one.max_grad_norm for one in rates):
        return None
    limits = [one.max_grad_norm or float("inf") for one in rates]
    limits_S = torch.tensor(limits, dtype=squared_norms_S.dtype, device=squared_norms_S.device)
    return (limits_S / (squared_norms_S.sqrt() + CLIP_EPSILON)).clamp(max=1.0).unsqueeze(1)


def _columns(rates: Sequence[Rates], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """shrink, the root of the second moment's correction, and minus the size of the step: ``[S, 1]`` each."""
    rows = [
        (
            1 - one.learning_rate * one.weight_decay,
            (1 - BETA2**one.step) ** 0.5,
            -one.learning_rate / (1 - BETA1**one.step),
        )
        for one in rates
    ]
    shrink, root, size = torch.tensor(rows, dtype=like.dtype, device=like.device).unsqueeze(2).unbind(1)
    return shrink, root, size


def _step_stack(stack: Stack, clip_S1: Tensor | None, shrink_S1: Tensor, root_S1: Tensor, size_S1: Tensor) -> None:
    """A layer at a time: its adapters together fit into the caches of a CPU."""
    shrink = shrink_S1 if stack.trained is None else torch.where(stack.trained, shrink_S1, 1.0)
    for layer in range(len(stack.paths)):
        parameters, gradients = stack.parameters[layer], stack.gradients[layer]
        exp_avg, exp_avg_sq = stack.exp_avg[layer], stack.exp_avg_sq[layer]
        if clip_S1 is not None:
            gradients.mul_(clip_S1)
        parameters.mul_(shrink)
        exp_avg.lerp_(gradients, 1 - BETA1)
        exp_avg_sq.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        denominator = exp_avg_sq.sqrt().div_(root_S1).add_(EPSILON)
        parameters.addcmul_(torch.div(exp_avg, denominator, out=gradients), size_S1)
