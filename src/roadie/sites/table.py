"""One layer's part of a bank: the rotations of each slot, in two tables, or two for each stage.

Legend: S slots, D out features, K stages (1 for plain adapters).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roadie.kernels import Chain, RotationTable, table_of
from roadie.rotation import Rotation

ANY_SIZE = 2  # the group size of a slot that holds the identity: it pairs nothing
NO_SLOT = -1  # of rows of the base model
NO_ROTATION = 0  # the group size of a slot without a rotation in the tables of a chain beyond the first


class SlotTable:
    """direct, cross ``[S, D]`` of one site, on its device, once for each stage that an adapter in it has had.

    Rows that were never written are the identity. `current` is replaced as a whole where the tables grow or group sizes begin
    to differ; rows are written in place, and only rows that nobody reads.

    is_sparse: few slots may have a rotation here; rows of the others pass bit for bit, as those of the base model do. is_fixed:
    the tables stay where they are, also where group sizes differ, since graphs may be captured over them. num_stages: for how
    many rotations in a row there is room from the start. version: how often `current` was replaced, after which such graphs do
    not rotate as the slots say.
    """

    def __init__(
        self,
        out_features: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_sparse: bool = False,
        is_fixed: bool = False,
        num_stages: int = 1,
    ) -> None:
        table = _identity_table(out_features, num_slots, dtype, device, ANY_SIZE)
        if is_fixed:
            table = table_of(table.direct, table.cross, _sizes(table.direct, ANY_SIZE))
        self.current: Chain = (table,)
        self._is_empty = True
        self.version = 0
        if num_stages > 1:
            self._lengthen(num_stages)
        self._holders = Holders(num_slots, device) if is_sparse else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        tables = sum(
            table.direct.nbytes + table.cross.nbytes + (0 if table.sizes is None else table.sizes.nbytes)
            for table in self.current
        )
        return tables + (0 if self._holders is None else self._holders.nbytes)

    def routed(self, slots: Tensor) -> Tensor:
        """The slots, on this device, with -1 for those that have no rotation here where the table is sparse."""
        return slots if self._holders is None else self._holders.routed(slots)

    def has_none(self, slots: Tensor) -> bool:
        """Whether none of the slots, on the CPU, has a rotation here."""
        return self._holders is not None and self._holders.has_none(slots)

    def write(self, slots: Sequence[int], rotations: Sequence[Rotation]) -> None:
        """Put the stages of chains, ``[K, D]`` each for K slots that nobody reads, into these, rounded to the tables' dtype."""
        if self._holders is not None:
            self._holders.set(slots, slots)
        if len(self.current) == len(rotations) == 1:  # of hundreds of layers, most of the time
            self._set_group_sizes(0, slots, rotations[0].group_size)
            _write_rows(self.current[0], slots, rotations[0])
            return
        if len(rotations) > len(self.current):
            self._lengthen(len(rotations))
        for stage in range(len(self.current)):
            rotation = rotations[stage] if stage < len(rotations) else None
            self._set_group_sizes(stage, slots, NO_ROTATION if rotation is None else rotation.group_size)
            if rotation is not None:
                _write_rows(self.current[stage], slots, rotation)

    def clear(self, slots: Sequence[int]) -> None:
        """Put the identity into slots that nobody reads."""
        if self._holders is not None:
            self._holders.set(slots, [NO_SLOT] * len(slots))
        first, *others = self.current
        rows = torch.tensor(slots, device=first.direct.device)
        first.direct.index_fill_(0, rows, 1.0)
        first.cross.index_fill_(0, rows, 0.0)
        if first.sizes is not None:
            first.sizes.index_fill_(0, rows, ANY_SIZE)
        for table in others:
            assert table.sizes is not None
            table.sizes.index_fill_(0, rows, NO_ROTATION)

    def read(self, slot: int) -> tuple[Rotation, ...]:
        """A copy of the rotations in a slot, the first applied first."""
        return tuple(
            Rotation(rotation.direct.clone(), rotation.cross.clone(), rotation.group_size)
            for rotation in rotations_at(self.current, slot)
        )

    def grow(self, num_slots: int) -> None:
        """Room for more slots, in new tables; whoever reads the old ones goes on reading them."""
        first, *others = self.current
        grown = [_grown(first, num_slots, ANY_SIZE), *(_grown(table, num_slots, NO_ROTATION) for table in others)]
        self.current = tuple(grown)
        self.version += 1
        if self._holders is not None:
            self._holders.grow(num_slots)

    def _lengthen(self, num_rotations: int) -> None:
        """Room for more stages, which no slot has yet."""
        direct = self.current[0].direct
        more = num_rotations - len(self.current)
        shape = direct.shape[1], direct.shape[0], direct.dtype, direct.device
        self.version += 1
        self.current = (*self.current, *(_identity_table(*shape, _sizes(direct, NO_ROTATION)) for _ in range(more)))

    def _set_group_sizes(self, stage: int, slots: Sequence[int], group_size: int) -> None:
        for slot in slots:
            self._set_group_size(stage, slot, group_size)

    def _set_group_size(self, stage: int, slot: int, group_size: int) -> None:
        table = self.current[stage]
        if isinstance(table.group_sizes, Tensor):
            table.group_sizes[slot] = group_size
            return
        if self._is_empty:
            self._is_empty = False
            self._replace_first(table_of(table.direct, table.cross, [group_size]))
        elif table.group_sizes != group_size:
            sizes = _sizes(table.direct, table.group_sizes)
            sizes[slot] = group_size
            self._replace_first(table_of(table.direct, table.cross, sizes))

    def _replace_first(self, table: RotationTable) -> None:
        self.version += 1
        self.current = (table, *self.current[1:])


class Holders:
    """Which slots of a layer have a rotation: slot -> itself, or -1, with a further -1 at the end, for -1: int64 ``[S + 1]``."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._here = torch.full((num_slots + 1,), NO_SLOT)
        self._there = self._here.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._there.nbytes

    def routed(self, slots: Tensor) -> Tensor:
        """The slots, -1 where they have none; on the device."""
        return self._there[slots]

    def has_none(self, slots: Tensor) -> bool:
        """Whether no slot, on the CPU, has one."""
        return not bool((self._here[slots] >= 0).any())

    def set(self, slots: Sequence[int], values: Sequence[int]) -> None:
        """Note what slots have that nobody reads."""
        if len(slots) == 1:  # as in `_write_rows`
            self._here[slots[0]] = values[0]
        else:
            self._here[list(slots)] = torch.tensor(list(values))
        self._there = self._here.to(self._there.device)

    def grow(self, num_slots: int) -> None:
        """Room for more slots; whoever reads the old ones goes on reading them."""
        more = num_slots + 1 - len(self._here)
        self._here = torch.cat((self._here, self._here.new_full((more,), NO_SLOT)))
        self._there = self._here.to(self._there.device)


def rotations_at(chain: Chain, slot: int) -> tuple[Rotation, ...]:
    """The rotations ``[D]`` of one slot (views), the first applied first."""
    sizes = [t.group_sizes if isinstance(t.group_sizes, int) else int(t.group_sizes[slot]) for t in chain]
    return tuple(
        Rotation(table.direct[slot], table.cross[slot], size)
        for table, size in zip(chain, sizes, strict=True)
        if size != NO_ROTATION
    )


def chain_of_rows(rows: Sequence[Sequence[Rotation]], dtype: torch.dtype) -> Chain | None:
    """Tables ``[S, D]`` in `dtype` whose slots hold `rows`: chains of rotations ``[D]``, or none; differentiable.

    None where all have none.
    """
    stages = range(max(map(len, rows)))
    tables = [_table_of_rows([row[stage] if stage < len(row) else None for row in rows], dtype) for stage in stages]
    return tuple(tables) or None


def _table_of_rows(rotations: Sequence[Rotation | None], dtype: torch.dtype) -> RotationTable:
    like = next(rotation.direct for rotation in rotations if rotation is not None)
    one = torch.ones_like(like)
    direct = torch.stack([(one if rotation is None else rotation.direct).to(dtype) for rotation in rotations])
    cross = torch.stack([(one * 0 if rotation is None else rotation.cross).to(dtype) for rotation in rotations])
    sizes = [NO_ROTATION if rotation is None else rotation.group_size for rotation in rotations]
    return table_of(direct, cross, sizes)


def _identity_table(
    out_features: int, num_slots: int, dtype: torch.dtype, device: torch.device, group_sizes: int | Tensor
) -> RotationTable:
    direct = torch.ones(num_slots, out_features, dtype=dtype, device=device)
    return table_of(direct, torch.zeros_like(direct), [group_sizes] if isinstance(group_sizes, int) else group_sizes)


def _sizes(direct: Tensor, group_size: int) -> Tensor:
    return torch.full((len(direct),), group_size, dtype=torch.int32, device=direct.device)


def _write_rows(table: RotationTable, slots: Sequence[int], rotation: Rotation) -> None:
    direct, cross = table.direct, table.cross
    if len(slots) == 1:  # twice as fast, and there are a hundred layers
        row = slice(slots[0], slots[0] + 1)
        direct[row].copy_(rotation.direct, non_blocking=True)
        cross[row].copy_(rotation.cross, non_blocking=True)
        return
    rows = torch.tensor(slots, device=direct.device)
    direct.index_copy_(0, rows, rotation.direct.to(direct.dtype))
    cross.index_copy_(0, rows, rotation.cross.to(direct.dtype))


def _grown(table: RotationTable, num_slots: int, absent: int) -> RotationTable:
    more = num_slots - len(table.direct)
    direct = torch.cat((table.direct, table.direct.new_ones(more, table.direct.shape[1])))
    cross = torch.cat((table.cross, table.cross.new_zeros(more, table.cross.shape[1])))
    sizes = table.group_sizes
    return table_of(
        direct, cross, [sizes] if isinstance(sizes, int) else torch.cat((sizes, sizes.new_full((more,), absent)))
    )
