"""What every implementation of the rotation is given and must do.

For each row t of a batch, with its slot s, and each pair (i, k) of outputs, k = i + G/2 inside a group of G:

    z_i = direct_si * x_i - cross_si * x_k               R x           (`Implementation.rotate`)
    z_k = direct_sk * x_k + cross_sk * x_i

    grad_x_i = direct_si * g_i + cross_sk * g_k          R^T g         (`Implementation.backward`)
    grad_x_k = direct_sk * g_k - cross_si * g_i
    own_si = sum over the slot's rows of g_i * kept_i
    partner_si = sum over the slot's rows of g_i * kept_k, and of g_k * kept_i for the element k

`own` and `partner` are what the gradients of direct and cross are made of, whether the rotation's input or its output was
kept. Rows of slot -1 are the base: z = x, grad_x = g, no sums.

**Precision.** Arithmetic in float32 (float64 where x is float64), each product and each sum rounded by itself in `rotate`;
one rounding to the dtype of the result. Sums over rows are in float32 or wider, in an order that depends on the shapes
alone, so that they are the same in every run.

Legend: T rows (tokens), D out features, S slots, B routed rows, G group size. Matrices ``[T, D]`` have stride 1 along D and
any stride along T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PreparedRotation: TypeAlias = Callable[..., bool]
"""rotate(y) in place, rotate(y, z) into z, both ``[..., D]`` and contiguous; whether it was done.

Nothing is computed where y is not of the expected kind, or so large that several threads should share the work. Nobody may be
looking on (`roadie.kernels.is_looked_on`), which is for the caller to know.
"""


SUMS, OF_INPUT, OF_OUTPUT = range(3)
"""What `Implementation.backward` makes of the sums over rows: nothing, or gradients, where the input or the output was kept."""


class RowRotations(NamedTuple):
    """A table of rotations, and which of them each row uses.

    direct, cross: ``[S, D]``, contiguous, of `table_dtypes`; slots: int64 ``[B]``, from -1 to S - 1, on the device
    of x, or None where every row uses slot 0; repeat: T / B, how many consecutive rows share a slot;
    sizes: int32 ``[S]``, the group size of each slot, or None where all have `group_size`.
    """

    direct: Tensor
    cross: Tensor
    slots: Tensor | None
    repeat: int
    sizes: Tensor | None
    group_size: int


Turns: TypeAlias = tuple[RowRotations, ...]
"""The stages of a chain, the first applied first, all with the same slots; most often there is one."""


def table_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of tables that kernels take for rows of `dtype`; they compute in float32."""
    if dtype == torch.float32:
        return (torch.float32, torch.bfloat16, torch.float16)
    return (torch.float32, dtype)


def without_gaps(turns: RowRotations, dtype: torch.dtype) -> RowRotations:
    """The same with tables of `dtype`, and rows whose slot has group size 0 in slot -1.

    Where there are no slots, all rows use slot 0, which then must have a rotation.
    """
    turns = turns._replace(direct=turns.direct.to(dtype), cross=turns.cross.to(dtype))
    if turns.sizes is None:
        return turns
    slots, sizes = turns.slots, turns.sizes.clamp(min=2)
    if slots is not None:
        slots = torch.where(turns.sizes[slots.clamp(min=0)] > 0, slots, -1)
    return turns._replace(slots=slots, sizes=sizes)


class Implementation(ABC):
    """One way to compute the rotation. All of them write into memory that is given, and never keep it."""

    name: str

    @abstractmethod
    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """Why this implementation cannot work on such tensors here, or None where it can."""

    @abstractmethod
    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """Write R x into `out`, ``[T, D]`` both, in the dtype of x; `out` may be x itself (but must not overlap it otherwise)."""

    def prepare(self, chain: Turns, routed_shape: tuple[int, ...], y: Tensor) -> PreparedRotation | None:
        """`rotate_chain` of outputs like y, whose first dimensions are `routed_shape`, ready to be called many times.

        For decoding, where everything around a rotation counts. None where that would win nothing.
        """
        return None

    def rotate_chain(self, x: Tensor, out: Tensor, chain: Turns) -> None:
        """Write ``R_K ... R_1 x`` into `out`: `rotate` of each, and one rounding at the end.

        Where a slot's group size is 0 in a chain of several, it has no rotation there, and its rows pass as they are. What is in
        between is in float32, or float64 where x or a table is.
        """
        if len(chain) == 1:
            self.rotate(x, out, chain[0])
            return
        wide = torch.float64 if torch.float64 in (x.dtype, chain[0].direct.dtype) else torch.float32
        value = torch.empty(x.shape, dtype=wide, device=x.device).copy_(x)
        for turns in chain:
            self.rotate(value, value, without_gaps(turns, wide))
        slots = chain[0].slots
        if slots is None:
            out.copy_(value)
        else:  # rows of the base bit for bit, NaN included
            is_base = (slots < 0).repeat_interleave(chain[0].repeat).unsqueeze(1)
            out.copy_(torch.where(is_base, x, value.to(x.dtype)))

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
        solve: int = SUMS,
    ) -> None:
        """Write R^T grad into `grad_x`, and what `solve` makes of the sums over rows into `own` and `partner`; None: not wanted.

        grad, kept, grad_x: ``[T, D]`` in one dtype; own, partner: ``[S, D]``, float32 (float64 where grad is); every element is
        written, also for slots that no row uses. kept is None where own and partner are.

        solve: `SUMS`; or the gradients of direct and cross. With M = sum of g input^T a pair: grad_direct is M's diagonal,
        grad_cross_i = -M_ik, grad_cross_k = M_ki. `OF_INPUT`: kept is the rotation's input. `OF_OUTPUT`: the sums are over its
        output, sum of g output^T = M R^T, and M comes from solving for it; a singular R gives what is not finite, but 0 where all
        sums of the pair are 0: a slot that no row uses is not spoilt.
        """

    def backward_chain(
        self, grad: Tensor, kept: Tensor | None, grad_x: Tensor | None, chain: Turns, sums: Tensor | None, solve: int
    ) -> None:
        """`backward` of a chain; of one of several stages the input was kept, and gradients are wanted.

        sums: ``[2 K, S, D]``, own and partner of each stage in turn, or the gradients of its direct and cross.
        """
        of_stages: list[Any] = [None] * (2 * len(chain)) if sums is None else list(sums.unbind())
        if len(chain) == 1:
            self.backward(grad, kept, grad_x, chain[0], of_stages[0], of_stages[1], solve)
            return
        wide = torch.float64 if torch.float64 in (grad.dtype, chain[0].direct.dtype) else torch.float32
        stages = [without_gaps(turns, wide) for turns in chain]
        inputs: list[Any] = [None if kept is None else kept.to(wide)] * len(chain)
        for number in range(1, 0 if kept is None else len(chain)):
            inputs[number] = torch.empty_like(inputs[number - 1])
            self.rotate(inputs[number - 1], inputs[number], stages[number - 1])
        value = grad.to(wide)
        for number in reversed(range(len(chain))):
            after, value = value, torch.empty(grad.shape, dtype=wide, device=grad.device)
            own, partner = of_stages[2 * number : 2 * number + 2]
            self.backward(after, inputs[number], value, stages[number], own, partner, solve)
        if grad_x is not None:
            grad_x.copy_(value)
