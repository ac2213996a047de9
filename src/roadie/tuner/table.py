"""The rotations of one layer's adapters as a table with a row an adapter, made in a handful of operations.

One adapter is a table of one row; a mixed batch gathers rows of the table. The number of operations depends on how
many variants and group sizes there are, never on how many adapters.

Legend: S slots (adapters, in the order asked for), D out features, n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from roadie.rotation import Rotation, from_parameters


class SlotParameters(NamedTuple):
    """What one adapter holds for one layer: theta and alpha ``[n]``, and how to read them."""

    theta: Tensor
    alpha: Tensor
    variant: str
    group_size: int


def build_table(slots: Sequence[SlotParameters | None], out_features: int) -> tuple[Rotation, ...]:
    """Tables ``[S, D]``, one for each group size among the slots; None is the identity.

    Two group sizes share no pair, so each has a table of its own, in which the rows of the other sizes are the identity;
    applying all tables one after the other rotates every row exactly once. Differentiable. Empty if every slot is None.
    """
    members: dict[int, dict[str, list[int]]] = {}
    for index, slot in enumerate(slots):
        if slot is not None:
            members.setdefault(slot.group_size, {}).setdefault(slot.variant, []).append(index)
    return tuple(_table_of_size(slots, size, by_variant, out_features) for size, by_variant in sorted(members.items()))


def _table_of_size(
    slots: Sequence[SlotParameters | None], group_size: int, by_variant: dict[str, list[int]], out_features: int
) -> Rotation:
    parts = [_rows_of_variant(slots, indices, variant, group_size) for variant, indices in sorted(by_variant.items())]
    order = [index for _, indices in sorted(by_variant.items()) for index in indices]
    direct, cross = (torch.cat(vectors) if len(vectors) > 1 else vectors[0] for vectors in zip(*parts, strict=True))
    if order == list(range(len(slots))):
        return Rotation(direct, cross, group_size)
    one = torch.ones(1, out_features, dtype=direct.dtype, device=direct.device)
    direct, cross = torch.cat((direct, one)), torch.cat((cross, torch.zeros_like(one)))
    position = {slot: row for row, slot in enumerate(order)}
    rows = torch.tensor([position.get(slot, len(order)) for slot in range(len(slots))], device=direct.device)
    return Rotation(direct.index_select(0, rows), cross.index_select(0, rows), group_size)


def _rows_of_variant(
    slots: Sequence[SlotParameters | None], indices: list[int], variant: str, group_size: int
) -> tuple[Tensor, Tensor]:
    chosen = [slots[index] for index in indices]
    theta, alpha = (torch.stack([getattr(slot, name) for slot in chosen]) for name in ("theta", "alpha"))
    rotation = from_parameters(theta, alpha, variant, group_size)
    return rotation.direct, rotation.cross


@dataclass
class _Entry:
    slots: tuple[SlotParameters | None, ...]
    versions: tuple[int, ...]
    addresses: tuple[int, ...]
    storages: tuple[torch.UntypedStorage, ...]  # kept, so that an address cannot come back as another's
    content: Tensor | None  # of the parameters on the CPU, one after the other
    tables: tuple[Rotation, ...]
    checked_for: object


@dataclass
class TableCache:
    """Tables that are kept while the parameters they were made from stay what they were.

    Used only where no gradient is wanted. A table is taken again when every parameter is the same tensor, at the same
    address, with the same version counter; and, on the CPU, with the same content, compared once for each `batch` object
    (each time where there is none): writes through ``param.data`` leave no other trace. On other devices, where
    comparing would wait for the device, parameters that could be training are never kept; frozen ones are, and whoever
    writes to their ``.data`` calls `clear`.
    """

    entries: dict[tuple[str, ...], _Entry] = field(default_factory=dict)
    limit: int = 16

    def clear(self) -> None:
        """Forget every table."""
        self.entries.clear()

    def get(
        self, key: tuple[str, ...], slots: tuple[SlotParameters | None, ...], out_features: int, batch: object
    ) -> tuple[Rotation, ...]:
        """The tables of `slots`, from memory if they are still true. `batch` marks one set of rows being routed."""
        parameters = [tensor for slot in slots if slot is not None for tensor in slot[:2]]
        if not all(_can_be_kept(tensor) for tensor in parameters):
            return build_table(slots, out_features)
        entry = self.entries.get(key)
        if entry is not None and _is_current(entry, slots, parameters, batch):
            entry.checked_for = batch
            return entry.tables
        return self._make(key, slots, parameters, out_features, batch)

    def _make(
        self,
        key: tuple[str, ...],
        slots: tuple[SlotParameters | None, ...],
        parameters: list[Tensor],
        out_features: int,
        batch: object,
    ) -> tuple[Rotation, ...]:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used in training later
            tables = build_table(slots, out_features)
            content = _content_on_cpu(parameters)
        storages = tuple(tensor.untyped_storage() for tensor in parameters)
        while len(self.entries) >= self.limit:
            del self.entries[next(iter(self.entries))]
        self.entries.pop(key, None)
        self.entries[key] = _Entry(
            slots, _versions(parameters), _addresses(parameters), storages, content, tables, batch
        )
        return tables

    def __deepcopy__(self, memo: dict[int, object]) -> TableCache:
        return TableCache()

    def __reduce__(self) -> tuple[type[TableCache], tuple[()]]:
        return TableCache, ()


def _is_current(
    entry: _Entry, slots: tuple[SlotParameters | None, ...], parameters: list[Tensor], batch: object
) -> bool:
    same = len(entry.slots) == len(slots) and all(_same_slot(a, b) for a, b in zip(entry.slots, slots, strict=True))
    if not same or entry.versions != _versions(parameters):
        return False
    if entry.addresses != _addresses(parameters):
        return False
    if batch is not None and entry.checked_for is batch:
        return True
    if entry.content is None:
        return True
    with torch.no_grad():
        content = _content_on_cpu(parameters)
    return content is not None and torch.equal(entry.content, content)


def _content_on_cpu(parameters: list[Tensor]) -> Tensor | None:
    on_cpu = [tensor for tensor in parameters if tensor.device.type == "cpu"]
    return torch.cat(on_cpu) if on_cpu else None


def _same_slot(old: SlotParameters | None, new: SlotParameters | None) -> bool:
    if old is None or new is None:
        return old is new
    return old.theta is new.theta and old.alpha is new.alpha and old[2:] == new[2:]


def _versions(parameters: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in parameters)


def _addresses(parameters: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in parameters)


def _can_be_kept(tensor: Tensor) -> bool:
    if type(tensor) not in (torch.nn.Parameter, Tensor) or tensor.is_inference() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or not tensor.requires_grad
