"""One layer's part of a bank: a rotation a slot, in two tables.

Legend: S slots, D out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roadie.kernels import RotationTable
from roadie.rotation import Rotation

ANY_SIZE = 2  # the group size of a slot that holds the identity: it pairs nothing


class LayerTable:
    """direct, cross ``[S, D]`` of one layer, on its device; rows that were never written are the identity.

    `current` is replaced as a whole where the tables grow or group sizes begin to differ; rows are written in place, and only
    rows that nobody reads.
    """

    def __init__(self, out_features: int, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        direct = torch.ones(num_slots, out_features, dtype=dtype, device=device)
        self.current = RotationTable(direct, torch.zeros_like(direct), ANY_SIZE)
        self._is_empty = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        sizes = self.current.sizes
        return self.current.direct.nbytes + self.current.cross.nbytes + (sizes.nbytes if sizes is not None else 0)

    def write(self, slots: Sequence[int], rotation: Rotation) -> None:
        """Put rotations ``[K, D]`` into K slots that nobody reads, rounded to the tables' dtype."""
        for slot in slots:
            self._set_group_size(slot, rotation.group_size)
        direct, cross = self.current.direct, self.current.cross
        if len(slots) == 1:  # twice as fast, and there are a hundred layers
            row = slice(slots[0], slots[0] + 1)
            direct[row].copy_(rotation.direct)
            cross[row].copy_(rotation.cross)
            return
        rows = torch.tensor(slots, device=direct.device)
        direct.index_copy_(0, rows, rotation.direct.to(direct.dtype))
        cross.index_copy_(0, rows, rotation.cross.to(direct.dtype))

    def clear(self, slots: Sequence[int]) -> None:
        """Put the identity into slots that nobody reads."""
        rows = torch.tensor(slots, device=self.current.direct.device)
        self.current.direct.index_fill_(0, rows, 1.0)
        self.current.cross.index_fill_(0, rows, 0.0)

    def read(self, slot: int) -> Rotation:
        """A copy of the rotation in a slot."""
        table = self.current
        size = table.group_sizes if isinstance(table.group_sizes, int) else int(table.group_sizes[slot])
        return Rotation(table.direct[slot].clone(), table.cross[slot].clone(), size)

    def grow(self, num_slots: int) -> None:
        """Room for more slots, in new tables; whoever reads the old ones goes on reading them."""
        table, more = self.current, num_slots - len(self.current.direct)
        direct = torch.cat((table.direct, table.direct.new_ones(more, table.direct.shape[1])))
        cross = torch.cat((table.cross, table.cross.new_zeros(more, table.cross.shape[1])))
        sizes: int | Tensor = table.group_sizes
        if not isinstance(sizes, int):
            sizes = torch.cat((sizes, sizes.new_full((more,), ANY_SIZE)))
        self.current = RotationTable(direct, cross, sizes)

    def _set_group_size(self, slot: int, group_size: int) -> None:
        table = self.current
        if isinstance(table.group_sizes, Tensor):
            table.group_sizes[slot] = group_size
            return
        if self._is_empty:
            self.current, self._is_empty = RotationTable(table.direct, table.cross, group_size), False
        elif table.group_sizes != group_size:
            sizes = torch.full((len(table.direct),), table.group_sizes, dtype=torch.int32, device=table.direct.device)
            sizes[slot] = group_size
            self.current = RotationTable(table.direct, table.cross, sizes)
