"""Many adapters that are trained at once: their parameters in stacks, and each row of a batch in an adapter of its own.

Adapters of one shape (the same layers with the same variants, group sizes and shares) form a family. The parameters of a family
lie stacked, so that a step costs a handful of operations a layer however many adapters there are:

    parameters [L, 2, S, n]  --from_parameters-->  a table (direct, cross) [S, D] a layer, a leaf of autograd
        gradients [L, 2, S, n]  <--parameter_gradients--  the table's gradient, summed over all backward passes of a step

Only the adapters that take part in a step are in its tables: what the others have costs nothing.

In the forward the output of each adapted layer, or its input, is rotated by `roadie.kernels`, row by row; a row whose adapter
leaves a site alone has slot -1 there. Hooks do this on a plain model, and are taken away at the end of the context.

The parameters of pairs outside of an adapter's share get a gradient of zero, whatever it would be.

Legend: as in `roadie.bank.families`; B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadie.adapter import is_input
from roadie.bank.attachment import Site, site_at
from roadie.bank.families import AdaptedLayer, Family, Stack
from roadie.errors import RoutingError
from roadie.experts import Pairs
from roadie.kernels import Chain, Keep, RotationTable, rotate_checked, table_of
from roadie.rotation import Rotation, Variant, chain_from_parameters, parameter_gradients, split_stages
from roadie.sites.rows import Choice, Routing
from roadie.sites.table import NO_ROTATION

MOST_OF_A_FAMILY = 64  # adapters, further ones make another: who joins or leaves copies the stacks of one


class TrainableBank:
    """Adapters that are trained together on one frozen model; see the module.

    keep: what the layers keep for backward; None: the output, in a lazy copy, where all adapters of the layer are road_1, else
    the input. Rotations of inputs keep what they are given, which several layers may be given.
    slots: the adapters that are in the tables, and their slots.
    """

    def __init__(self, device: torch.device, keep: Keep | None = None) -> None:
        self.families: list[Family] = []
        self.slots: dict[str, int] = {}
        self._device = device
        self._keep = keep
        self._parts: list[_Part] = []
        self._tables: dict[str, _LayerTable] = {}
        self._routing: Routing[Choice] = Routing()
        self._row_of_slot: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def names(self) -> list[str]:
        """The adapters, family by family; in the order of their slots where all are in the tables."""
        return [name for family in self.families for name in family.names]

    def family_of(self, name: str) -> Family:
        """The family with the adapter `name`; raises `RoutingError` where there is none."""
        for family in self.families:
            if name in family.names:
                return family
        raise RoutingError(f"got adapter {name!r}; wanted one of {', '.join(self.names) or 'none: the bank is empty'}")

    def join(self, newcomers: Mapping[str, Sequence[AdaptedLayer]]) -> None:
        """Add adapters of these layers, as the identity; all of a family at once, since its stacks are copied."""
        families: dict[tuple[AdaptedLayer, ...], list[str]] = {}
        for name, layers in newcomers.items():
            families.setdefault(tuple(layers), []).append(name)
        for layers, names in families.items():
            while names:
                family = self._family(layers)
                room = MOST_OF_A_FAMILY - len(family.names)
                family.add(names[:room])
                names = names[room:]
        self._forget_tables()

    def keep_only(self, names: Collection[str]) -> None:
        """Take every other adapter out."""
        for family in self.families:
            if not set(family.names) <= set(names):
                family.keep(names)
        self.families = [family for family in self.families if family.names]
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._parts, self.slots = [], {}
        self._tables.clear()

    def _family(self, layers: Sequence[AdaptedLayer]) -> Family:
        for family in self.families:
            if family.layers == tuple(layers) and len(family.names) < MOST_OF_A_FAMILY:
                return family
        self.families.append(Family(layers, self._device))
        return self.families[-1]

    def make_tables(self, names: Collection[str] | None = None) -> None:
        """Make the tables anew from the parameters, with no gradients: once before each training step.

        names: the adapters that take part, None for all; `slots` says how they are numbered.
        """
        with torch.no_grad():
            self._parts = [part for family in self.families if (part := _part(family, names)) is not None]
            sites: dict[str, list[_Share]] = {}
            for number, part in enumerate(self._parts):
                for taken in part.stacks:
                    for index, path in enumerate(taken.stack.paths):
                        sites.setdefault(path, []).append(_Share(number, taken, index))
            keeps = {path: Keep.INPUT if is_input(path) else self._keep for path in sites}
            self._tables = {path: _layer_table(shares, keeps[path]) for path, shares in sites.items()}
        self.slots = {name: slot for slot, name in enumerate(name for part in self._parts for name in part.names)}
        self._row_of_slot.clear()

    def gradients(self) -> Iterator[PartGradients]:
        """The gradients of the tables as those of parameters, family by family."""
        with torch.no_grad():
            for number, part in enumerate(self._parts):
                tensors = [self._gradients(number, taken) for taken in part.stacks]
                squares = torch.stack([tensor.square().sum(dim=(0, 1, 3)) for tensor in tensors]).sum(dim=0)
                yield PartGradients(part.names, part.family, part.rows, tensors, squares)

    def _gradients(self, number: int, taken: _Taken) -> Tensor:
        """Of the parameters of one stack, ``[L, 2, S, n]``."""
        stack, parameters = taken.stack, taken.parameters
        gradients = torch.empty(parameters.shape, dtype=parameters.dtype, device=parameters.device)
        parts = (split_stages(stored, len(stack.stages)) for stored in (parameters, gradients))
        for stage, (group_size, of_stage, into) in enumerate(zip(stack.stages, *parts, strict=True)):
            direct, cross = self._vector_gradients(number, taken, stage)
            of_both = parameter_gradients(direct, cross, of_stage[:, 0], of_stage[:, 1], stack.variant, group_size)
            torch.stack(of_both, dim=1, out=into)
        return gradients if stack.trained is None else gradients.masked_fill_(~stack.trained, 0.0)

    def _vector_gradients(self, number: int, taken: _Taken, stage: int) -> tuple[Tensor, Tensor]:
        """Of direct and cross ``[L, S, D]``; 0 where the forward did not come by a layer."""
        vectors = taken.rotations[stage]
        found = [self._tables[path].gradients(number, stage) for path in taken.stack.paths]
        none = torch.zeros_like(vectors.direct[0])
        direct, cross = ([none if pair is None else pair[member] for pair in found] for member in (0, 1))
        return torch.stack(direct), torch.stack(cross)

    @contextmanager
    def attached(self, model: nn.Module, paths: Collection[str] | None = None) -> Iterator[None]:
        """Within the block the sites `paths` (None: those of the tables) are rotated wherever rows are routed (`routed`)."""
        with ExitStack() as stack:
            stack.callback(self._routing.detach, self._routing.attach(model))
            for path in self._tables if paths is None else paths:
                site = site_at(model, path)
                stack.callback(site.attach(_SiteRotation(self, path, site)))
            yield

    def routed(self, slots: Tensor) -> AbstractContextManager[Any]:
        """Within the block row b of a batch uses the adapter at ``slots[b]`` (int64 ``[B]`` or ``[B, T]``); -1: none."""
        return self._routing.chosen(Choice(slots))

    def in_force(self, path: str) -> tuple[_LayerTable, Choice] | None:
        """By what the site `path` is rotated now; None where no rows are routed, or no adapter has the site."""
        table, choice = self._tables.get(path), self._routing.current()
        return None if table is None or choice is None else (table, choice)

    def rows_of(self, table: _LayerTable) -> tuple[int, ...] | None:
        """For each slot its row in a table, or -1, as it is for slot -1; None where the rows are the slots."""
        parts = tuple(table.rows)
        if len(parts) == len(self._parts):
            return None
        if parts not in self._row_of_slot:
            rows: list[int] = []
            count = 0
            for number, part in enumerate(self._parts):
                size = len(part.names)
                rows += range(count, count + size) if number in parts else [-1] * size
                count += size if number in parts else 0
            self._row_of_slot[parts] = (*rows, -1)
        return self._row_of_slot[parts]


@dataclass(frozen=True, eq=False)
class PartGradients:
    """The gradients of adapters of one family that are in the tables.

    names: of S adapters, which are in these rows of the family; tensors: ``[L, 2, S, n]`` for each stack; squares: of their
    norms, ``[S]``.
    """

    names: Sequence[str]
    family: Family
    rows: Sequence[int]
    tensors: Sequence[Tensor]
    squares: Tensor

    def add(self, places: Sequence[int]) -> None:
        """Add those of the adapters at these places of `names` to `Stack.gradients`."""
        rows = torch.tensor([self.rows[place] for place in places])
        for stack, tensor in zip(self.family.stacks, self.tensors, strict=True):
            chosen = tensor if len(places) == len(self.names) else tensor[:, :, list(places)]
            stack.gradients.index_add_(2, rows.to(tensor.device), chosen)


class _SiteRotation(NamedTuple):
    """What rotates a site of an attached model."""

    bank: TrainableBank
    path: str
    site: Site

    def of(self, y: Tensor, is_fresh: Callable[[], bool], pairs: Pairs | None = None) -> Tensor:
        """y, each row by its adapter; pairs: see `LayerRotation.of`."""
        found = self.bank.in_force(self.path)
        if found is None:
            return y
        table, choice = found
        rows = self.bank.rows_of(table)
        if pairs is None:
            return rotate_checked(y, table.chain, choice.placed(y, self.site.layer, rows), table.keep, is_fresh())
        slots = pairs.placed(choice, self.site.layer, rows)
        chain, of_pairs = pairs.spread(table.chain, slots, self.site.num_rotations)
        return rotate_checked(y, chain, of_pairs, table.keep, is_fresh())

    def rests(self) -> bool:
        return self.bank.in_force(self.path) is None


class _Taken(NamedTuple):
    """What is in the tables of one stack: parameters ``[L, 2, S, n]``, and for each stage direct, cross ``[L, S, D]``."""

    stack: Stack
    parameters: Tensor
    rotations: tuple[Rotation, ...]


class _Part(NamedTuple):
    """The adapters of one family that are in the tables, and their rows in the family."""

    family: Family
    names: Sequence[str]
    rows: Sequence[int]
    stacks: Sequence[_Taken]


class _Share(NamedTuple):
    """What a part gives to a table: the rotations of one layer of a stack."""

    part: int
    taken: _Taken
    layer: int


def _part(family: Family, names: Collection[str] | None) -> _Part | None:
    wanted = None if names is None else set(names)
    rows = [row for row, name in enumerate(family.names) if wanted is None or name in wanted]
    if not rows:
        return None
    stacks = [_taken(stack, None if len(rows) == len(family.names) else rows) for stack in family.stacks]
    return _Part(family, [family.names[row] for row in rows], rows, stacks)


def _taken(stack: Stack, rows: Sequence[int] | None) -> _Taken:
    parameters = stack.parameters if rows is None else stack.parameters[:, :, list(rows)]
    theta, alpha = parameters.unbind(1)
    return _Taken(stack, parameters, chain_from_parameters(theta, alpha, stack.variant, stack.stages))


@dataclass(frozen=True, eq=False)
class _LayerTable:
    """The rotations of one site, a table a stage; rows: those of each part."""

    chain: Chain
    rows: Mapping[int, slice]
    keep: Keep

    def gradients(self, part: int, stage: int) -> tuple[Tensor, Tensor] | None:
        """Of direct and cross ``[S, D]`` of a part's rows; None where the forward did not come by."""
        table = self.chain[stage]
        if table.direct.grad is None or table.cross.grad is None:
            return None
        return table.direct.grad[self.rows[part]], table.cross.grad[self.rows[part]]


def _layer_table(shares: Sequence[_Share], keep: Keep | None) -> _LayerTable:
    counts = [share.taken.parameters.shape[2] for share in shares]
    begins = [sum(counts[:number]) for number in range(len(counts))]
    chains = [
        tuple(Rotation(r.direct[share.layer], r.cross[share.layer], r.group_size) for r in share.taken.rotations)
        for share in shares
    ]
    chain = tuple(_table(stage, counts) for stage in zip_longest(*chains))
    alike = all(share.taken.stack.variant is Variant.ROAD_1 for share in shares)
    rows = {share.part: slice(begin, begin + count) for share, begin, count in zip(shares, begins, counts, strict=True)}
    return _LayerTable(chain, rows, keep or (Keep.COPY if alike else Keep.INPUT))


def _table(rotations: Sequence[Rotation | None], counts: Sequence[int]) -> RotationTable:
    """The table of one stage; the rows of families whose chains are shorter are the identity, with group size 0."""
    like = next(filter(None, rotations)).direct
    shapes = [(count, like.shape[1]) for count in counts]
    parts = [
        rotation or Rotation(like.new_ones(shape), like.new_zeros(shape), NO_ROTATION)
        for rotation, shape in zip(rotations, shapes, strict=True)
    ]
    sizes = [part.group_size for part, count in zip(parts, counts, strict=True) for _ in range(count)]
    return table_of(_leaf([part.direct for part in parts]), _leaf([part.cross for part in parts]), sizes)


def _leaf(parts: list[Tensor]) -> Tensor:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.detach().requires_grad_()
