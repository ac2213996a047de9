"""The rotations of one layer's adapters as a table with a row an adapter, made in a handful of operations.

One adapter is a table of one row; each row of a mixed batch names the row of the table it uses. The number of operations
depends on how many variants and group sizes there are, never on how many adapters. Adapters with several rotations in a row
take as many tables, a chain; those with fewer have group size 0 in the tables beyond.

Legend: S slots (adapters, in the order asked for), D out features, n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _every_module

from roadie.bank.blends import Blend, blended
from roadie.bank.table import ANY_SIZE, NO_ROTATION, chain_of_rows, rotations_at
from roadie.kernels import Chain, PreparedRotation, RotationTable, Watched
from roadie.rotation import Rotation, from_parameters, split_stages

PLAIN = (Tensor, nn.Parameter)


class SlotParameters(NamedTuple):
    """What one adapter holds for one layer: theta and alpha ``[n]``, and how to read them.

    group_size: of its one rotation, or of those in a row.
    """

    theta: Tensor
    alpha: Tensor
    variant: str
    group_size: int | tuple[int, ...]

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained."""
        return self.theta.requires_grad or self.alpha.requires_grad

    @property
    def stages(self) -> tuple[int, ...]:
        """The group sizes of the rotations, the first applied first."""
        return (self.group_size,) if isinstance(self.group_size, int) else self.group_size

    @property
    def size_of_one(self) -> int:
        """The group size of the one rotation there is."""
        assert isinstance(self.group_size, int)
        return self.group_size


def build_chain(slots: Sequence[SlotParameters | None], out_features: int) -> Chain | None:
    """The tables ``[S, D]`` of the slots, one for each rotation in a row; None where all are the identity. Differentiable."""
    stages = by_stage(slots)
    tables = [build_table(stage, out_features, absent=absent_in(stages)) for stage in stages]
    return tuple(table for table in tables if table is not None) or None


def absent_in(stages: Sequence[Any]) -> int:
    """The group size of a slot that is the identity, in each table of so many."""
    return ANY_SIZE if len(stages) <= 1 else NO_ROTATION


def by_stage(slots: Sequence[SlotParameters | None]) -> list[list[SlotParameters | None]]:
    """For each rotation in a row the slots as if it were the only one; None for those that have fewer."""
    count = max([0, *(len(slot.stages) for slot in slots if slot is not None)])
    if count <= 1:
        return [list(slots)] * count
    parts = [_split(slot) for slot in slots]
    return [[part[stage] if stage < len(part) else None for part in parts] for stage in range(count)]


def _split(slot: SlotParameters | None) -> list[SlotParameters]:
    if slot is None:
        return []
    theta, alpha = (split_stages(vector, len(slot.stages)) for vector in slot[:2])
    parts = zip(theta, alpha, slot.stages, strict=True)
    return [SlotParameters(of_theta, of_alpha, slot.variant, size) for of_theta, of_alpha, size in parts]


def build_table(
    slots: Sequence[SlotParameters | None], out_features: int, *, absent: int = ANY_SIZE
) -> RotationTable | None:
    """The table ``[S, D]`` of slots with one rotation; one that is None is the identity. None where all are. Differentiable.

    absent: the group size of slots that are None.
    """
    members = by_kind(slots)
    if not members:
        return None
    parts = [_rows_of_kind(slots, indices, *kind) for kind, indices in sorted(members.items())]
    order = [index for _, indices in sorted(members.items()) for index in indices]
    direct, cross = (torch.cat(vectors) if len(vectors) > 1 else vectors[0] for vectors in zip(*parts, strict=True))
    if order != list(range(len(slots))):
        direct, cross = _in_order(direct, cross, order, len(slots))
    return RotationTable(direct, cross, _group_sizes(slots, direct.device, absent))


def by_kind(slots: Sequence[SlotParameters | None]) -> dict[tuple[str, int], list[int]]:
    """Variant and group size -> the slots of this kind."""
    members: dict[tuple[str, int], list[int]] = {}
    for index, slot in enumerate(slots):
        if slot is not None:
            members.setdefault((slot.variant, slot.size_of_one), []).append(index)
    return members


def stacked(slots: Sequence[SlotParameters | None], indices: list[int]) -> tuple[Tensor, Tensor]:
    """theta and alpha ``[k, n]`` of k slots."""
    chosen = [slot for slot in (slots[index] for index in indices) if slot is not None]
    if len(chosen) == 1:
        return chosen[0].theta.unsqueeze(0), chosen[0].alpha.unsqueeze(0)
    return torch.stack([slot.theta for slot in chosen]), torch.stack([slot.alpha for slot in chosen])


def _rows_of_kind(
    slots: Sequence[SlotParameters | None], indices: list[int], variant: str, group_size: int
) -> tuple[Tensor, Tensor]:
    rotation = from_parameters(*stacked(slots, indices), variant, group_size)
    return rotation.direct, rotation.cross


def _in_order(direct: Tensor, cross: Tensor, order: list[int], num_slots: int) -> tuple[Tensor, Tensor]:
    """Row k of the result is the row that stands for slot order[k]; slots that are not in `order` get the identity."""
    one = torch.ones(1, direct.shape[1], dtype=direct.dtype, device=direct.device)
    direct, cross = torch.cat((direct, one)), torch.cat((cross, torch.zeros_like(one)))
    position = {slot: row for row, slot in enumerate(order)}
    rows = torch.tensor([position.get(slot, len(order)) for slot in range(num_slots)], device=direct.device)
    return direct.index_select(0, rows), cross.index_select(0, rows)


def with_blends(chain: Chain | None, names: Sequence[str], wishes: Sequence[Any]) -> Chain | None:
    """From tables whose rows are the adapters `names`, those whose rows are `wishes`, blends of these adapters included.

    Adapters that are not among the names have no rotation.

    Differentiable. Raises `AdapterError` or `ConfigError` where a blend does not exist.
    """
    if chain is None:
        return None
    rows: list[Sequence[Rotation]] = []
    for wish in wishes:
        weights = wish.weights if isinstance(wish, Blend) else ((wish, 1.0),)
        parts = [
            (name, weight, (rotations_at(chain, names.index(name)) if name in names else ()) or None)
            for name, weight in weights
        ]
        rotations = parts[0][2] if isinstance(wish, str) else blended(f"of {chain[0].direct.shape[1]} outputs", parts)
        rows.append(rotations or ())
    return chain_of_rows(rows, chain[0].direct.dtype)


def _group_sizes(slots: Sequence[SlotParameters | None], device: torch.device, absent: int) -> int | Tensor:
    """absent: what stands for slots that are None, unless it may be any."""
    sizes = {slot.size_of_one for slot in slots if slot is not None}
    if len(sizes) == 1 and (absent == ANY_SIZE or None not in slots):
        return sizes.pop()
    each = [slot.size_of_one if slot is not None else absent for slot in slots]
    return torch.tensor(each, dtype=torch.int32, device=device)


@dataclass
class TableEntry:
    """A table, and everything that was true of the parameters it was made from."""

    name: str  # of the first slot
    slots: tuple[SlotParameters | None, ...]
    parameters: list[Tensor]
    versions: list[int]
    addresses: list[int]
    storages: list[torch.UntypedStorage]  # kept, so that an address cannot come back as another's
    watched: Watched
    table: Chain | None
    checked_for: object

    def is_current(self, slots: tuple[SlotParameters | None, ...], batch: object) -> bool:
        if len(slots) != len(self.slots) or not all(map(_same_slot, slots, self.slots)):
            return False
        if not self.is_unwritten() or [p.data_ptr() for p in self.parameters] != self.addresses:
            return False
        if (batch is None or self.checked_for is not batch) and not self.has_same_content():
            return False
        self.checked_for = batch
        return True

    def is_of(self, layer: Any) -> bool:
        """Whether the adapter of a table of one row is still this one; looked up without the detours of nn.Module."""
        slot, modules = self.slots[0], layer._modules
        return slot is not None and (
            modules["road_theta"]._parameters.get(self.name) is slot.theta
            and modules["road_alpha"]._parameters.get(self.name) is slot.alpha
            and layer.group_size.get(self.name) == slot.group_size
        )

    def is_unwritten(self) -> bool:
        """Whether no parameter was written to by an operation that torch counts."""
        return [p._version for p in self.parameters] == self.versions

    def has_same_content(self) -> bool:
        return self.watched.are_unchanged()


@dataclass
class LastRotation:
    """The last rotation in place of a plain batch, of which `active` were the active adapters, and how to do it again."""

    prepared: PreparedRotation
    active: str | list[str]
    entry: TableEntry

    def forward(self, layer: Any, x: Tensor) -> Tensor | None:
        """The whole forward of `layer`, if it is what it was the last time; None if not, with nothing computed.

        The base layer is not called but computed, as `nn.Linear` does it: without its hooks, of which it has none.
        All in one function, because each call of one costs microseconds here (`roadie.kernels.cpu.prepared`).
        """
        modules, routing, slot, name = layer._modules, layer._routing, self.entry.slots[0], self.entry.name
        base = modules["base_layer"]
        weight = base._parameters.get("weight")
        if (
            torch.is_grad_enabled()
            or type(base) is not nn.Linear
            or type(weight) is not nn.Parameter
            or base._forward_hooks
            or base._forward_pre_hooks
            or "forward" in base.__dict__
            or _every_module._global_forward_hooks
            or _every_module._global_forward_pre_hooks
            or layer._disable_adapters
            or layer.merged_adapters
            or routing.here.get() is not None
            or slot is None
            or layer._active_adapter != self.active
            or modules["road_theta"]._parameters.get(name) is not slot.theta
            or modules["road_alpha"]._parameters.get(name) is not slot.alpha
            or layer.group_size.get(name) != slot.group_size
        ):
            return None
        inputs = modules.get("road_input")
        y = nn.functional.linear(x if inputs is None else inputs(x), weight, base._parameters["bias"])
        if self.prepared.rotate_(y):
            return y
        result: Tensor = layer._rotated(y, True)
        return result

    def of_input(self, layer: Any, x: Tensor) -> Tensor | None:
        """x rotated into new memory by `layer`, if it is what it was the last time; None if not, with nothing computed."""
        if (
            torch.is_grad_enabled()
            or layer._disable_adapters
            or layer._routing.here.get() is not None
            or layer._active_adapter != self.active
            or not self.entry.is_of(layer)
        ):
            return None
        return self.prepared.rotated(x)


@dataclass
class TableCache:
    """Tables that are kept while the parameters they were made from stay what they were.

    Used only where no gradient is wanted. A table is taken again when every parameter is the same tensor, at the same
    address, with the same version counter; and, on the CPU, with the same content, compared once for each `batch` object
    (each time where there is none): writes through ``param.data`` leave no other trace. On other devices, where
    comparing would wait for the device, parameters that could be training are never kept; frozen ones are, and whoever
    writes to their ``.data`` calls `clear`.
    """

    entries: dict[tuple[str, ...], TableEntry] = field(default_factory=dict)
    last: LastRotation | None = None
    trained: TableEntry | None = None
    limit: int = 16

    def clear(self) -> None:
        """Forget every table."""
        self.entries.clear()
        self.last = self.trained = None

    def checked(self, key: tuple[str, ...], batch: object) -> TableEntry | None:
        """The entry that was found true for this batch before, if no parameter was written to since."""
        entry = self.entries.get(key) if batch is not None else None
        return entry if entry is not None and entry.checked_for is batch and entry.is_unwritten() else None

    def get(
        self, key: tuple[str, ...], slots: tuple[SlotParameters | None, ...], out_features: int, batch: object
    ) -> Chain | None:
        """The tables of `slots`, from memory if it is still true. `batch` marks one set of rows being routed."""
        entry = self.entries.get(key)
        if entry is not None and entry.is_current(slots, batch):
            return entry.table
        parameters = [tensor for slot in slots if slot is not None for tensor in slot[:2]]
        if not all(can_be_kept(tensor) for tensor in parameters):
            with torch.no_grad():
                return build_chain(slots, out_features)
        return self._make(key, slots, parameters, out_features, batch)

    def _make(
        self,
        key: tuple[str, ...],
        slots: tuple[SlotParameters | None, ...],
        parameters: list[Tensor],
        out_features: int,
        batch: object,
    ) -> Chain | None:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used in training later
            table = build_chain(slots, out_features)
        self.entries.pop(key, None)
        while len(self.entries) >= self.limit:
            del self.entries[next(iter(self.entries))]
        self.entries[key] = TableEntry(
            key[0] if key else "",
            slots,
            parameters,
            [tensor._version for tensor in parameters],
            [tensor.data_ptr() for tensor in parameters],
            [tensor.untyped_storage() for tensor in parameters],
            Watched(parameters),
            table,
            batch,
        )
        return table

    def __deepcopy__(self, memo: dict[int, object]) -> TableCache:
        return TableCache()

    def __reduce__(self) -> tuple[type[TableCache], tuple[()]]:
        return TableCache, ()


def _same_slot(old: SlotParameters | None, new: SlotParameters | None) -> bool:
    if old is None or new is None:
        return old is new
    return old.theta is new.theta and old.alpha is new.alpha and old[2:] == new[2:]


def can_be_kept(tensor: Tensor) -> bool:
    """Whether what is made of a parameter may be kept: every later write to it will be seen."""
    if type(tensor) not in PLAIN or tensor.is_inference() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or not tensor.requires_grad
