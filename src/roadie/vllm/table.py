"""The rotations of one layer, a row a slot, in memory that never moves: graphs may be captured over it.

Legend: S slots, D outputs of the layer on this device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roadie.kernels import RotationTable, can_rotate_in_place, rotate_rows, rotate_rows_
from roadie.rotation import Rotation

ANY_SIZE = 2  # the group size of the identity, which pairs nothing


class SlotTable:
    """direct, cross ``[S, D]`` float32 and each slot's group size; a slot that was never written is the identity."""

    def __init__(self, num_slots: int, out_features: int, device: torch.device) -> None:
        direct = torch.ones(num_slots, out_features, dtype=torch.float32, device=device)
        sizes = torch.full((num_slots,), ANY_SIZE, dtype=torch.int32, device=device)
        self.rotations = RotationTable(direct, torch.zeros_like(direct), sizes)

    @property
    def out_features(self) -> int:
        """D."""
        return self.rotations.direct.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        sizes = self.rotations.sizes
        assert sizes is not None
        return self.rotations.direct.nbytes + self.rotations.cross.nbytes + sizes.nbytes

    def write(self, slot: int, rotation: Rotation | None) -> None:
        """Put a rotation ``[D]`` (None: the identity) into a slot, in place."""
        table, sizes = self.rotations, self.rotations.sizes
        assert sizes is not None
        if rotation is None:
            table.direct[slot].fill_(1.0)
            table.cross[slot].zero_()
            sizes[slot] = ANY_SIZE
            return
        table.direct[slot].copy_(rotation.direct, non_blocking=True)
        table.cross[slot].copy_(rotation.cross, non_blocking=True)
        sizes[slot] = rotation.group_size


def rotated(y: Tensor, table: SlotTable, slots: Tensor) -> Tensor:
    """y ``[T, D]`` with each row rotated by its slot (int64 ``[T]``, -1: as it is); y itself where it may be overwritten."""
    if can_rotate_in_place(y, table.rotations):
        return rotate_rows_(y, table.rotations, slots)
    return rotate_rows(y, table.rotations, slots)
