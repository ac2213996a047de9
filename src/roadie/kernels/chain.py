"""Rotations in a row: a layer's output through several tables of rotations, one after the other, in one pass.

    rotate_chain(x, chain, slots)       each row by the rotations of its slot, the first table's first
    rotate_chain_(x, chain, slots)      in place, where no gradient is needed

A chain of one table is what `roadie.kernels.api` does, at the same cost. In a longer one all rotations of a row are computed
while it is in the cache: in float32 (float64 for float64), with one rounding at the end. A slot whose group size is 0 in a
table has no rotation there.

**What backward keeps** of a longer chain is its input. What lies between the rotations is computed again, which is cheaper
than keeping a tensor of the batch's size for each.

Legend: x ``[..., D]``, S slots, K tables of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from roadie.kernels import api, schema
from roadie.kernels.api import RotationTable
from roadie.kernels.choice import chosen
from roadie.kernels.contract import RowRotations, without_gaps
from roadie.kernels.cpu.prepared import PreparedRotation, prepare
from roadie.kernels.eager import composed
from roadie.kernels.keeping import Keep, saved_tensors, to_save

Chain: TypeAlias = tuple[RotationTable, ...]


def rotate_chain(x: Tensor, chain: Chain, slots: Tensor | None, *, keep: Keep | str = Keep.INPUT) -> Tensor:
    """Each row of x by the rotations of its slot, in new memory of x's dtype, with one rounding; differentiable.

    x, slots: as in `rotate_rows`; chain: one table or more, of equal shapes and one dtype. keep: as in `rotate`; several
    rotations in a row keep their input, whatever it says. Raises as `rotate_rows` does.
    """
    if len(chain) == 1:
        return api.rotate_rows(x, chain[0], slots, keep=keep)
    for table in chain:
        api.checked(x, table, slots)
    if not takes_kernels(x, chain):
        return _one_by_one(x, chain, slots)
    if _needs_gradient(x, chain):
        vectors = [vector for table in chain for vector in (table.direct, table.cross)]
        rotated: Tensor = _Chain.apply(x, slots, tuple(table.group_sizes for table in chain), *vectors)
        return rotated
    return _forward(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), chain, slots)


def rotate_chain_(x: Tensor, chain: Chain, slots: Tensor | None) -> Tensor:
    """As `rotate_chain`, in place of x, which is returned; only where `can_rotate_chain_in_place`."""
    if len(chain) == 1:
        return api.rotate_rows_(x, chain[0], slots)
    for table in chain:
        api.checked(x, table, slots)
    if not can_rotate_chain_in_place(x, chain):
        return x.copy_(rotate_chain(x, chain, slots))
    _forward(x, x, chain, slots)
    if not x.is_inference():  # so that autograd sees the change of what it saved
        torch.autograd.graph.increment_version(x)
    return x


def takes_kernels(x: Tensor, chain: Chain) -> bool:
    """`api.takes_kernels` of all tables."""
    return all(api.takes_kernels(x, table) for table in chain)


def can_rotate_chain_in_place(x: Tensor, chain: Chain) -> bool:
    """Whether nothing here needs a gradient, and nobody traces what is computed."""
    return all(api.can_rotate_in_place(x, table) for table in chain)


def prepare_chain(
    y: Tensor, chain: Chain, slots: Tensor | None, watched: tuple[Tensor, Tensor] | None = None
) -> PreparedRotation | None:
    """`rotate_chain_` of tensors like y, made ready to be called many times; as `prepare_rotation`."""
    if len(chain) == 1:
        return api.prepare_rotation(y, chain[0], slots, watched)
    turns = [schema.row_rotations(*api.checked(y, table, slots)) for table in chain]
    return prepare(turns, tuple(slots.shape) if slots is not None else (), y, watched)


def _needs_gradient(x: Tensor, chain: Chain) -> bool:
    return any(api.needs_gradient(x, table) for table in chain)


def _forward(x: Tensor, out: Tensor, chain: Chain, slots: Tensor | None) -> Tensor:
    """All rotations, from x into out (which may be x), without gradient."""
    if not x.numel():
        return out
    turns = [_turns(x, table, slots) for table in chain]
    rows, into = schema.matrix(x), schema.matrix(out)
    chosen(x.device, x.dtype, chain[0].direct.dtype).rotate_chain(rows, into, turns)
    if into.data_ptr() != out.data_ptr():  # a copy, of an out that is no matrix
        out.copy_(into.view(out.shape))
    return out


def _turns(x: Tensor, table: RotationTable, slots: Tensor | None) -> Any:
    return schema.row_rotations(x, table.direct, table.cross, slots, table.sizes, table.uniform_size)


def _one_by_one(x: Tensor, chain: Chain, slots: Tensor | None) -> Tensor:
    """The same as operations that torch sees: for compilers, tracers and tensors made of tensors."""
    value = x.to(_wide(x, chain[0].direct))
    for table in chain:
        there, plain = _without_gaps(table, slots, value.dtype)
        value = api.rotate_rows(value, plain, there)
    return value.to(x.dtype)


def _without_gaps(
    table: RotationTable, slots: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, RotationTable]:
    """The slots, -1 where a slot has no rotation in the table, and the table in `dtype`."""
    turns = without_gaps(_raw(table, slots), dtype)
    return turns.slots, RotationTable(
        turns.direct, turns.cross, table.group_sizes if turns.sizes is None else turns.sizes
    )


def _raw(table: RotationTable, slots: Tensor | None) -> RowRotations:
    return RowRotations(table.direct, table.cross, slots, 1, table.sizes, table.uniform_size)


class _Chain(torch.autograd.Function):
    """x through all rotations; keeps x, where a table needs a gradient, and nothing else of the batch's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slots: Tensor | None, group_sizes: tuple[int | Tensor, ...], *vectors: Tensor
    ) -> Tensor:
        ctx.group_sizes = group_sizes
        kept = to_save(ctx, x, x, Keep.INPUT) if any(ctx.needs_input_grad[3:]) else None
        ctx.save_for_backward(kept, slots, *vectors)
        return _forward(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), _tables(vectors, group_sizes), slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, slots, *vectors = saved_tensors(ctx)
        chain = _tables(vectors, ctx.group_sizes)
        wide = _wide(grad, chain[0].direct)
        plain = [_without_gaps(table, slots, wide) for table in chain]
        inputs = _inputs(x.to(wide), plain) if x is not None else [None] * len(chain)
        value = grad.to(wide)
        of_tables: list[Tensor | None] = []
        for (there, table), kept in zip(reversed(plain), reversed(inputs), strict=True):
            arguments = table.direct, table.cross, there, table.sizes, table.uniform_size
            back, *of_table = schema.gradients(value, kept, *arguments, False, True)
            assert back is not None
            value, of_tables = back, [*of_table, *of_tables]
        of_vectors = [g if g is None else g.to(v.dtype) for g, v in zip(of_tables, vectors, strict=True)]
        return value.to(grad.dtype) if ctx.needs_input_grad[0] else None, None, None, *of_vectors


def _tables(vectors: Sequence[Tensor], group_sizes: Sequence[int | Tensor]) -> Chain:
    pairs = zip(vectors[::2], vectors[1::2], group_sizes, strict=True)
    return tuple(RotationTable(direct, cross, size) for direct, cross, size in pairs)


def _inputs(x: Tensor, plain: Sequence[tuple[Tensor | None, RotationTable]]) -> list[Tensor]:
    """What each rotation of the chain was given; differentiable where gradients are to be differentiated again."""
    inputs = [x]
    for there, table in plain[:-1]:
        arguments = table.direct, table.cross, there, table.sizes, table.uniform_size
        rotated = composed if torch.is_grad_enabled() else schema.forward
        inputs.append(rotated(inputs[-1], *arguments))
    return inputs


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
