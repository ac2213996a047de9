"""Rotations as the kernels take them: tables with a row a slot, and a chain of several tables.

Legend: x ``[..., D]`` of any floating dtype, S slots, B routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from roadie.errors import AdapterError, RoutingError
from roadie.kernels.constants import constant
from roadie.kernels.contract import RowRotations, without_gaps
from roadie.rotation import Rotation, check_group_size


@dataclass(frozen=True, eq=False)
class RotationTable:
    """A rotation a slot: direct, cross ``[S, D]``; group_sizes: one for all slots, or each slot's own, int32 ``[S]``.

    Group sizes given as a tensor are trusted here and checked where they are used on a CPU.
    """

    direct: Tensor
    cross: Tensor
    group_sizes: int | Tensor

    @property
    def uniform_size(self) -> int:
        """The group size of all slots, or 0 where each has its own."""
        return self.group_sizes if isinstance(self.group_sizes, int) else 0

    @property
    def sizes(self) -> Tensor | None:
        """The group size of each slot, or None where all have the same."""
        return None if isinstance(self.group_sizes, int) else self.group_sizes


def table_of(direct: Tensor, cross: Tensor, sizes: Sequence[int] | Tensor) -> RotationTable:
    """The table of vectors ``[S, D]`` and the group sizes of the slots, one for all of them or one for each."""
    if isinstance(sizes, Tensor):
        return RotationTable(direct, cross, sizes)
    if len(set(sizes)) == 1:
        return RotationTable(direct, cross, sizes[0])
    return RotationTable(direct, cross, constant(sizes, torch.int32, direct.device))


Chain: TypeAlias = tuple[RotationTable, ...]
"""A table for each stage, of equal shapes and one dtype, the first applied first; most often there is one."""


def as_chain(rotations: Rotation | RotationTable | Sequence[RotationTable]) -> Chain:
    """The chain of one rotation ``[D]``, which every row uses, of one table, or of several."""
    if isinstance(rotations, RotationTable):
        return (rotations,)
    if not isinstance(rotations, Rotation):
        return tuple(rotations)
    if rotations.direct.dim() != 1:
        raise AdapterError(
            f"got a rotation of shape {tuple(rotations.direct.shape)}; wanted [D]; make a RotationTable of vectors [S, D]"
        )
    return (RotationTable(rotations.direct.unsqueeze(0), rotations.cross.unsqueeze(0), rotations.group_size),)


def vectors_of(chain: Chain) -> list[Tensor]:
    """direct and cross of each table in turn."""
    vectors: list[Tensor] = []
    for table in chain:
        vectors += (table.direct, table.cross)
    return vectors


def with_vectors(chain: Chain, vectors: Sequence[Tensor]) -> Chain:
    """The same group sizes with other vectors, given as `vectors_of` gives them."""
    pairs = zip(chain, vectors[::2], vectors[1::2], strict=True)
    return tuple(RotationTable(direct, cross, table.group_sizes) for table, direct, cross in pairs)


def table_without_gaps(
    table: RotationTable, slots: Tensor | None, dtype: torch.dtype
) -> tuple[RotationTable, Tensor | None]:
    """The table in `dtype`, and the slots, -1 where a slot has no rotation in it."""
    turns = without_gaps(RowRotations(table.direct, table.cross, slots, 1, table.sizes, table.uniform_size), dtype)
    return RotationTable(
        turns.direct, turns.cross, table.group_sizes if turns.sizes is None else turns.sizes
    ), turns.slots


def check(x: Tensor, chain: Chain, slots: Tensor | None) -> None:
    """Raise `AdapterError` or `RoutingError` unless x, the tables and the slots fit together."""
    width = x.shape[-1] if x.dim() else 0
    for table in chain:
        direct, cross, sizes = table.direct, table.cross, table.group_sizes
        if direct.dim() != 2 or direct.shape != cross.shape or direct.shape[1] != width or not len(direct):
            raise AdapterError(
                f"got x {tuple(x.shape)}, direct {tuple(direct.shape)} and cross {tuple(cross.shape)}; wanted x [..., D] and "
                "two tables [S, D] of the same D, with at least one slot"
            )
        if direct.dtype != cross.dtype or direct.device != x.device or cross.device != x.device:
            raise AdapterError(
                f"got x on {x.device}, direct {direct.dtype} on {direct.device} and cross {cross.dtype} on {cross.device}; "
                "wanted one device, and tables of one dtype"
            )
        if isinstance(sizes, int):
            if sizes < 2 or width % sizes or sizes % 2:
                check_group_size(sizes, width)
        elif sizes.shape != direct.shape[:1] or sizes.dtype != torch.int32:
            raise AdapterError(
                f"got group_sizes {sizes.dtype} {tuple(sizes.shape)}; wanted int32 [{len(direct)}], one for each slot"
            )
    if slots is not None:
        _check_slots(x, slots)


def _check_slots(x: Tensor, slots: Tensor) -> None:
    is_leading = 0 < slots.dim() < x.dim() and x.shape[: slots.dim()] == slots.shape
    if slots.dtype != torch.int64 or not is_leading or slots.device != x.device:
        raise RoutingError(
            f"got slots {slots.dtype} {tuple(slots.shape)} on {slots.device} for x {tuple(x.shape)} on {x.device}; wanted "
            "int64 on x's device, in the shape of x's first dimensions: one slot for each row, or for each token"
        )
