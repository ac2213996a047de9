"""Many adapters that are trained at once: their parameters in stacks, and each row of a batch in an adapter of its own.

Adapters of one shape (the same layers with the same variants, group sizes and shares) form a family. The parameters of a family
lie stacked, so that a step costs a handful of operations a layer however many adapters there are:

    parameters [L, 2, S, n]  --from_parameters-->  a table (direct, cross) [S, D] a layer, a leaf of autograd
        gradients [L, 2, S, n]  <--parameter_gradients--  the table's gradient, summed over all backward passes of a step

In the forward the output of each adapted layer, or its input, is rotated by `roadie.kernels`, row by row; a row whose adapter
leaves a site alone has slot -1 there. Hooks do this on a plain model, and are taken away at the end of the context.

The parameters of pairs outside of an adapter's share get a gradient of zero, whatever it would be.

Legend: as in `roadie.bank.families`; B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadie.adapter import is_input, layer_of
from roadie.bank.attachment import Hooks, LayerInput
from roadie.bank.families import AdaptedLayer, Family, Stack
from roadie.errors import RoutingError
from roadie.kernels import Chain, Keep, RotationTable, rotate_checked, table_of
from roadie.rotation import Rotation, Variant, chain_from_parameters, parameter_gradients, split_stages
from roadie.sites.rows import Choice, Routing
from roadie.sites.table import NO_ROTATION


class TrainableBank:
    """Adapters that are trained together on one frozen model; see the module.

    keep: what the layers keep for backward; None: the output, in a lazy copy, where all adapters of the layer are road_1, else
    the input. Rotations of inputs keep what they are given, which several layers may be given.
    """

    def __init__(self, device: torch.device, keep: Keep | None = None) -> None:
        self.families: list[Family] = []
        self._device = device
        self._keep = keep
        self._tables: dict[str, _LayerTable] = {}
        self._routing: Routing[Choice] = Routing()
        self._row_of_slot: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def names(self) -> list[str]:
        """The adapters in the order of their slots."""
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
            self._family(layers).add(names)
        self._tables.clear()

    def load(
        self, names: Sequence[str], layers: Sequence[AdaptedLayer], tensors: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add a whole family as `Stack.tensors` gave it; raises `AdapterError` where it is not of these layers."""
        self._family(layers).load(names, tensors)
        self._tables.clear()

    def keep_only(self, names: Sequence[str]) -> None:
        """Take every other adapter out."""
        for family in self.families:
            if not set(family.names) <= set(names):
                family.keep(names)
        self.families = [family for family in self.families if family.names]
        self._tables.clear()

    def _family(self, layers: Sequence[AdaptedLayer]) -> Family:
        for family in self.families:
            if family.layers == tuple(layers):
                return family
        self.families.append(Family(layers, self._device))
        return self.families[-1]

    def make_tables(self) -> None:
        """Make the tables anew from the parameters, with no gradients: once before each training step."""
        sites: dict[str, list[tuple[int, Stack, int]]] = {}
        for number, family in enumerate(self.families):
            for stack in family.stacks:
                for index, path in enumerate(stack.paths):
                    sites.setdefault(path, []).append((number, stack, index))
        with torch.no_grad():
            self._tables = {path: _layer_table(parts, self._keep_at(path)) for path, parts in sites.items()}
        self._row_of_slot.clear()

    def _keep_at(self, path: str) -> Keep | None:
        return Keep.INPUT if is_input(path) else self._keep

    def collect_gradients(self, sum_: Callable[[Tensor], object] | None = None) -> list[Tensor]:
        """Turn the gradients of the tables into `Stack.gradients`; the squares of their norms ``[S]`` for each family.

        sum_: sums a tensor over several processes, in place, where each has seen some of the rows.
        """
        squares = [torch.zeros(len(family.names), device=self._device) for family in self.families]
        with torch.no_grad():
            for family, square in zip(self.families, squares, strict=True):
                for stack in family.stacks:
                    for index, path in enumerate(stack.paths):
                        square += self._tables[path].gradients_into(stack, index)
            if sum_ is not None:
                return [_summed_squares(family, sum_) for family in self.families]
        return squares

    @contextmanager
    def attached(self, model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
        """Within the block the sites `paths` are rotated wherever rows are routed (`routed`)."""
        hooks: Any = Hooks()
        with ExitStack() as stack:
            stack.callback(self._routing.detach, self._routing.attach(model))
            for path in paths:
                layer = model.get_submodule(layer_of(path))
                hooked = LayerInput(layer) if is_input(path) else layer
                stack.callback(hooks.attach(hooked, _Site(self, path, layer)))
            yield

    def routed(self, slots: Tensor) -> AbstractContextManager[Any]:
        """Within the block row b of a batch uses the adapter at ``slots[b]`` (int64 ``[B]`` or ``[B, T]``); -1: none."""
        return self._routing.chosen(Choice(slots))

    def rotated(self, path: str, layer: nn.Module, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor:
        """y of the site `path`, which is at `layer`, each row by its adapter; itself where none is routed, or has the site."""
        table, choice = self._tables.get(path), self._routing.current()
        if table is None or choice is None:
            return y
        slots = choice.placed(y, layer, self._rows_of(table.families))
        return rotate_checked(y, table.chain, slots, table.keep, is_fresh())

    def _rows_of(self, families: tuple[int, ...]) -> tuple[int, ...] | None:
        """For each slot its row in a table of these families, or -1, as it is for slot -1; None where the rows are the slots."""
        if len(families) == len(self.families):
            return None
        if families not in self._row_of_slot:
            rows: list[int] = []
            count = 0
            for number, family in enumerate(self.families):
                size = len(family.names)
                rows += range(count, count + size) if number in families else [-1] * size
                count += size if number in families else 0
            self._row_of_slot[families] = (*rows, -1)
        return self._row_of_slot[families]


def _summed_squares(family: Family, sum_: Callable[[Tensor], object]) -> Tensor:
    for stack in family.stacks:
        sum_(stack.gradients)
    return torch.stack([stack.gradients.square().sum(dim=(0, 1, 3)) for stack in family.stacks]).sum(dim=0)


class _Site(NamedTuple):
    """A site of an attached model, as `Hooks` rotate it."""

    bank: TrainableBank
    path: str
    layer: nn.Module

    def of(self, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor:
        return self.bank.rotated(self.path, self.layer, y, is_fresh)


@dataclass(frozen=True, eq=False)
class _LayerTable:
    """The rotations of one site: rows of each of `families` in turn, and where these rows begin; a table a stage."""

    chain: Chain
    families: tuple[int, ...]
    stacks: tuple[Stack, ...]
    begins: tuple[int, ...]
    keep: Keep

    def gradients_into(self, stack: Stack, index: int) -> Tensor:
        """Write the gradients of layer `index` of `stack`; the squares of their norms ``[S]``."""
        gradients, parameters = stack.gradients[index], stack.parameters[index]
        number = next(number for number, one in enumerate(self.stacks) if one is stack)
        rows = slice(self.begins[number], self.begins[number] + parameters.shape[1])
        parts = (split_stages(stored, len(stack.stages)) for stored in (parameters, gradients))
        for table, group_size, of_stage, into in zip(self.chain, stack.stages, *parts, strict=False):
            direct, cross = table.direct.grad, table.cross.grad
            if direct is None or cross is None:  # the forward did not come by this layer
                gradients.zero_()
                return gradients.new_zeros(parameters.shape[1])
            theta, alpha = of_stage
            of_both = parameter_gradients(direct[rows], cross[rows], theta, alpha, stack.variant, group_size)
            torch.stack(of_both, out=into)
        if stack.trained is not None:
            gradients.masked_fill_(~stack.trained, 0.0)
        return gradients.square().sum(dim=(0, 2))


def _layer_table(parts: Sequence[tuple[int, Stack, int]], keep: Keep | None) -> _LayerTable:
    families, stacks = tuple(part[0] for part in parts), tuple(part[1] for part in parts)
    counts = [stack.parameters.shape[2] for stack in stacks]
    begins = tuple(sum(counts[:number]) for number in range(len(counts)))
    chains = [
        chain_from_parameters(stack.parameters[index, 0], stack.parameters[index, 1], stack.variant, stack.stages)
        for _, stack, index in parts
    ]
    chain = tuple(_table(stage, counts) for stage in zip_longest(*chains))
    alike = all(stack.variant is Variant.ROAD_1 for stack in stacks)
    return _LayerTable(chain, families, stacks, begins, keep or (Keep.COPY if alike else Keep.INPUT))


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
