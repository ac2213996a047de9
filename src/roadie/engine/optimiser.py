"""AdamW for many adapters at once: each row of a stack has settings and a step count of its own.

For each adapter with gradient g, after clipping by the norm over all of its parameters (torch.nn.utils.clip_grad_norm_):

    p <- p (1 - rate decay);  m <- m + (g - m)(1 - b1);  v <- b2 v + (1 - b2) g^2
    p <- p - rate / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

which is what torch.optim.AdamW does for one adapter alone. Rows do not meet: what is not finite in one adapter stays there.
Places outside of `Stack.trained` keep their values bit for bit: their gradients and moments are 0, and they do not decay.

Legend: S adapters of a family; parameters as in `roadie.bank.families`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from roadie.bank.families import Family, Stack
from roadie.errors import ConfigError

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_SLAB = 1 << 16  # elements that are worked on at a time: what is read and written of them fits into the caches of a CPU


@dataclass(frozen=True)
class AdamSettings:
    """What one adapter is told for one step; torch.optim.AdamW's defaults, but for the decay.

    weight_decay: decoupled; max_grad_norm: 0 for no clipping. Raises `ConfigError` for values out of range.
    """

    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "eps"):
            _within(name, getattr(self, name), math.inf)
        for name in ("beta1", "beta2"):
            _within(name, getattr(self, name), 1.0)


def _within(name: str, value: float, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        raise ConfigError(
            f"got {name}={value!r}; wanted a number from 0 to below {'infinity' if below == math.inf else below}"
        )


class _Columns(NamedTuple):
    """What a step multiplies with, one for each adapter: ``[S, 1]``; clip: None where nothing is clipped."""

    clip: Tensor | None
    shrink: Tensor
    beta1: Tensor
    beta2: Tensor
    root: Tensor
    eps: Tensor
    size: Tensor


def step(
    family: Family,
    settings: Sequence[AdamSettings],
    steps: Sequence[int],
    squared_norms_S: Tensor,
    rows: Sequence[int] | None = None,
) -> None:
    """Change the parameters of adapters of a family by their gradients.

    steps: the number of this step for each, from 1; squared_norms_S: of the gradients of each; rows: which of the family
    they are, None for all.
    """
    columns = _columns(settings, steps, squared_norms_S)
    with torch.no_grad():
        for stack in family.stacks:
            for layers in _slabs(stack):
                _step_layers(stack, layers, columns, rows)


def squared_norms(family: Family, rows: Sequence[int]) -> Tensor:
    """Of the gradients of these adapters of a family, ``[S]``."""
    found = [stack.gradients[:, :, list(rows)].square().sum(dim=(0, 1, 3)) for stack in family.stacks]
    return torch.stack(found).sum(dim=0)


def _columns(settings: Sequence[AdamSettings], steps: Sequence[int], squared_norms_S: Tensor) -> _Columns:
    rows = [
        (
            1 - one.learning_rate * one.weight_decay,
            one.beta1,
            one.beta2,
            (1 - one.beta2**t) ** 0.5,
            one.eps,
            -one.learning_rate / (1 - one.beta1**t),
        )
        for one, t in zip(settings, steps, strict=True)
    ]
    made = torch.tensor(rows, dtype=torch.float64).to(squared_norms_S.device, squared_norms_S.dtype)
    return _Columns(_clipping(settings, squared_norms_S), *made.unsqueeze(2).unbind(1))


def _clipping(settings: Sequence[AdamSettings], squared_norms_S: Tensor) -> Tensor | None:
    if not any(one.max_grad_norm for one in settings):
        return None
    limits = [one.max_grad_norm or float("inf") for one in settings]
    limits_S = torch.tensor(limits, dtype=squared_norms_S.dtype, device=squared_norms_S.device)
    return (limits_S / (squared_norms_S.sqrt() + CLIP_EPSILON)).clamp(max=1.0).unsqueeze(1)


def _slabs(stack: Stack) -> Iterator[slice]:
    num_layers, *shape = stack.parameters.shape
    size = max(1, _SLAB // max(1, math.prod(shape)))
    return (slice(begin, begin + size) for begin in range(0, num_layers, size))


def _step_layers(stack: Stack, layers: slice, columns: _Columns, rows: Sequence[int] | None) -> None:
    stored = [tensor[layers] for tensor in (stack.parameters, stack.exp_avg, stack.exp_avg_sq, stack.gradients)]
    chosen = stored if rows is None else [tensor[:, :, list(rows)] for tensor in stored]
    parameters, exp_avg, exp_avg_sq, gradients = chosen
    if columns.clip is not None:
        gradients.mul_(columns.clip)
    parameters.mul_(columns.shrink if stack.trained is None else torch.where(stack.trained, columns.shrink, 1.0))
    exp_avg.lerp_(gradients, 1 - columns.beta1)
    exp_avg_sq.mul_(columns.beta2).addcmul_(gradients, gradients * (1 - columns.beta2))
    denominator = exp_avg_sq.sqrt().div_(columns.root).add_(columns.eps)
    parameters.addcmul_(torch.div(exp_avg, denominator, out=gradients), columns.size)
    if rows is not None:
        for whole, part in zip(stored[:3], chosen, strict=False):
            whole[:, :, list(rows)] = part
