"""Batches to rotate, the truth about them, and the checks that every implementation must pass (AssertionError otherwise).

The truth is R written out entry by entry, in float64 (`tests.laws.reference`). Bounds follow from the arithmetic: u being
the roundoff of what is computed in, a turned element is off by 2u ``|R| |x|`` and by one rounding to its dtype, and a sum
of n products by (n + 1) u times the sum of their absolute values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.laws.bounds import assert_within, wide
from tests.laws.reference import dense, pairs
from tests.laws.rotations import ROOM
from torch import Tensor

from roadie.kernels import Implementation, RowRotations
from roadie.kernels.cpu import CpuImplementation
from roadie.rotation import Rotation
from roadie.testing.accuracy import assert_as_accurate_as, assert_same_bits, smallest_step, unit_roundoff

GUARD = 67  # elements around what is written; odd, so that no row is aligned


@dataclass(frozen=True)
class Batch:
    """x, gradient and kept ``[T, D]``, and the rotations of the rows."""

    x: Tensor
    gradient: Tensor
    kept: Tensor
    turns: RowRotations


def batch(
    rows: int,
    width: int,
    sizes: int | Sequence[int] = 2,
    *,
    num_slots: int = 1,
    slots: Sequence[int] | None = None,
    repeat: int = 1,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    padding: int = 0,
    offset: int = 0,
    seed: int = 0,
) -> Batch:
    """Random rows; sizes: one group size or one a slot; padding: NaN between the rows; offset: and before them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix() -> Tensor:
        memory = torch.full((offset + rows * (width + padding),), torch.nan, dtype=dtype)
        x = memory[offset:].view(rows, width + padding)[:, :width]
        return x.copy_(random(rows, width))

    uniform = isinstance(sizes, int)
    direct, cross = (random(num_slots, width).to(table_dtype or wide(dtype)) for _ in range(2))
    routed = None if slots is None else torch.tensor(slots, dtype=torch.int64)
    own_sizes = None if uniform else torch.tensor(sizes, dtype=torch.int32)
    turns = RowRotations(direct, cross, routed, repeat, own_sizes, sizes if uniform else 0)
    return Batch(matrix(), matrix(), matrix(), turns)


def slot_of_rows(b: Batch) -> list[int]:
    """The slot of each row, -1 for the base."""
    slots = b.turns.slots
    return [0] * len(b.x) if slots is None else slots.repeat_interleave(b.turns.repeat).tolist()


def group_size_of(turns: RowRotations, slot: int) -> int:
    return turns.group_size if turns.sizes is None else int(turns.sizes[slot])


def dense_of_slots(turns: RowRotations) -> Tensor:
    """R of every slot, and of the base at the end: ``[S + 1, D, D]`` in float64, differentiable."""
    matrices = [
        dense(Rotation(direct, cross, group_size_of(turns, slot)))
        for slot, (direct, cross) in enumerate(zip(turns.direct, turns.cross, strict=True))
    ]
    return torch.stack([*matrices, torch.eye(turns.direct.shape[1], dtype=torch.float64)])


def swaps_of_slots(turns: RowRotations) -> Tensor:
    """For every slot the matrix that gives each element its partner: ``[S, D, D]`` in float64."""
    width = turns.direct.shape[1]
    swaps = torch.zeros(len(turns.direct), width, width, dtype=torch.float64)
    for slot in range(len(swaps)):
        for i, k in pairs(width, group_size_of(turns, slot)):
            swaps[slot, i, k] = swaps[slot, k, i] = 1
    return swaps


def by_rows(x: Tensor, matrices: Tensor, slots: list[int]) -> Tensor:
    """Each row of x, in float64, through the matrix of its slot."""
    if not len(x):
        return x.double()
    return torch.stack([matrices[slot] @ row for row, slot in zip(x.double(), slots, strict=True)])


def sums_by_slot(terms: Tensor, slots: list[int], num_slots: int) -> Tensor:
    return torch.stack([terms[[s == slot for s in slots]].sum(0) for slot in range(num_slots)])


def nan_like(x: Tensor) -> Tensor:
    """Memory of x's shape and strides in which nothing has been written yet, with more around it."""
    memory = torch.full((len(x) * x.stride(0) + 2 * GUARD,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, x.stride(), GUARD)


def assert_nothing_beside(z: Tensor) -> None:
    """Between, before and after the rows of memory from `nan_like` nothing was written."""
    memory = z.as_strided((z.untyped_storage().nbytes() // z.element_size(),), (1,), 0).clone()
    memory.as_strided(z.shape, z.stride(), GUARD).fill_(torch.nan)
    assert memory.isnan().all(), "something was written outside of the rows"


def turned(implementation: Implementation, b: Batch) -> Tensor:
    out = nan_like(b.x)
    implementation.rotate(b.x, out, b.turns)
    assert_nothing_beside(out)
    return out


def turned_back(implementation: Implementation, b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, own and partner, all written into NaN."""
    grad_x = nan_like(b.gradient)
    own, partner = (torch.full(b.turns.direct.shape, torch.nan, dtype=wide(b.x.dtype)) for _ in range(2))
    implementation.backward(b.gradient, b.kept, grad_x, b.turns, own, partner)
    assert_nothing_beside(grad_x)
    return grad_x, own, partner


def check_forward(implementation: Implementation, b: Batch) -> None:
    """R x, within its rounding; the rows of the base bit for bit; x as it was."""
    before = b.x.clone()
    z = turned(implementation, b)
    assert_same_bits(b.x, before, "the input")
    _check_turned(z, b.x, dense_of_slots(b.turns), b, "z")


def check_backward(implementation: Implementation, b: Batch) -> None:
    """R^T g, own and partner, within their rounding, also where only some of them are wanted."""
    grad_x, own, partner = turned_back(implementation, b)
    _check_turned(grad_x, b.gradient, dense_of_slots(b.turns).mT, b, "grad_x")
    slots, count, u = slot_of_rows(b), len(b.x) + 1, unit_roundoff(own.dtype)
    others = by_rows(b.kept, torch.cat((swaps_of_slots(b.turns), torch.zeros(1, *2 * b.x.shape[1:]).double())), slots)
    for value, kept, what in ((own, b.kept.double(), "own"), (partner, others, "partner")):
        terms = b.gradient.double() * kept
        truth, size = (sums_by_slot(t, slots, len(own)) for t in (terms, terms.abs()))
        assert_within(value, truth, count * u * size * ROOM, what)
    _check_parts_alone(implementation, b, grad_x, own, partner)


def _check_parts_alone(implementation: Implementation, b: Batch, grad_x: Tensor, own: Tensor, partner: Tensor) -> None:
    alone = nan_like(b.gradient)
    implementation.backward(b.gradient, None, alone, b.turns, None, None)
    assert_same_bits(alone, grad_x, "grad_x without sums")
    sums = torch.full_like(own, torch.nan), torch.full_like(own, torch.nan)
    implementation.backward(b.gradient, b.kept, None, b.turns, *sums)
    assert_same_bits(sums[0], own, "own without grad_x")
    assert_same_bits(sums[1], partner, "partner without grad_x")


def _check_turned(z: Tensor, x: Tensor, matrices: Tensor, b: Batch, what: str) -> None:
    slots, dtype = slot_of_rows(b), z.dtype
    truth, reach = by_rows(x, matrices, slots), by_rows(x.abs(), matrices.abs(), slots)
    inside = 2 * unit_roundoff(wide(dtype)) * reach
    last = unit_roundoff(dtype) * truth.abs() + smallest_step(dtype) / 2 if dtype != wide(dtype) else 0.0
    assert_within(z, truth, (inside + last) * ROOM + smallest_step(wide(dtype)), what)
    base = [slot < 0 for slot in slots]
    assert_same_bits(z[base], x[base], f"{what}, rows of the base")


def check_in_place(implementation: Implementation, b: Batch) -> None:
    """In place gives what new memory gives."""
    wanted, x = turned(implementation, b), nan_like(b.x).copy_(b.x)
    implementation.rotate(x, x, b.turns)
    assert_same_bits(x, wanted, "in place")
    assert_nothing_beside(x)


def check_same_bits(one: Implementation, other: Implementation, b: Batch) -> None:
    """Two implementations turn alike, there and back, bit for bit."""
    assert_same_bits(turned(one, b), turned(other, b), "z")
    assert_same_bits(turned_back(one, b)[0], turned_back(other, b)[0], "grad_x")


def assert_same_but_nan(value: Tensor, wanted: Tensor, what: str) -> None:
    """Same bits, but that any NaN is as good as another."""
    assert_same_bits(value.isnan(), wanted.isnan(), f"{what}, where it is NaN")
    assert_same_bits(value.nan_to_num(0.0, torch.inf, -torch.inf), wanted.nan_to_num(0.0, torch.inf, -torch.inf), what)


def in_float64(b: Batch) -> Batch:
    """The same numbers, so that an implementation that was found right computes their truth."""
    return Batch(*(part.double() for part in (b.x, b.gradient, b.kept)), b.turns)


def check_sums_as_accurate(implementation: Implementation, other: Implementation, b: Batch) -> None:
    """own and partner are as near to the float64 sums as those of the other implementation."""
    all_three = ((implementation, b), (other, b), (other, in_float64(b)))
    for value, rival, truth in zip(*(turned_back(*pair) for pair in all_three), strict=True):
        assert_as_accurate_as(value, rival, truth)


def check_sums_within_rounding(implementation: Implementation, other: Implementation, b: Batch) -> None:
    """own and partner against the other implementation's in float64, within what rounding can do; for large shapes."""
    exact = in_float64(b)
    absolute = Batch(exact.x, exact.gradient.abs(), exact.kept.abs(), exact.turns)
    found, truths, sizes = (turned_back(*p) for p in ((implementation, b), (other, exact), (other, absolute)))
    for value, truth, size in zip(found[1:], truths[1:], sizes[1:], strict=True):
        assert_within(value, truth, (len(b.x) + 1) * unit_roundoff(value.dtype) * size * ROOM, "sums")


def no_compiled_kernel() -> str | None:
    """Why the compiled implementation is missing, or None."""
    return CpuImplementation().refusal(torch.device("cpu"), torch.float32, torch.float32)


needs_compiled_kernel = pytest.mark.skipif(no_compiled_kernel() is not None, reason="there is no compiled kernel")
CPU_AND_EAGER = (pytest.param("cpu", marks=needs_compiled_kernel), "eager")
