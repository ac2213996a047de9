"""The tables of the RoAd layers of a model, made once a call of the model and not once a layer.

Before a call of the model all of its layers are looked at together: whether the tables that were made from their parameters
still hold (one stamp over all of them), and where they do not, or a gradient is wanted, all are made anew in a handful of
operations. While the call is running a layer's part is a lookup. A layer that is called by itself does the same for itself.

Legend: S slots, D features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from roadie.kernels import Chain, Keep, PreparedRotation, Stamp, can_be_stamped, is_looked_on
from roadie.rotation import Variant, parameter_size
from roadie.sites.parameters import Plan

Names: TypeAlias = Sequence[str] | None
"""Adapters with a slot each, in slot order; None: the active ones, whose chains are one slot's, end to end."""


Store: TypeAlias = dict[str, Any]


class Made(NamedTuple):
    """What a layer rotates by; None where it has nothing to. keep: what backward remembers of it.

    sources, tensors: where its parameters stand, and what stood there.
    """

    chain: Chain | None
    keep: Keep
    sources: tuple[tuple[Store, str], ...]
    tensors: tuple[Any, ...]

    def is_trained(self) -> bool:
        """Whether a parameter is trained."""
        return any(map(_requires_grad, self.tensors))


class Layout:
    """How the tables of some layers for `names` are made, as long as the layers hold these parameters.

    key: the names, and how often the layers had been changed until then (`RoadRouting.changes`).
    """

    def __init__(self, layers: Sequence[Any], names: Names, changes: int = 0) -> None:
        self.names, self.key = names, (names, changes)
        self._layers = layers
        self._others: tuple[list[Any], ...] = [], [], []  # what `Made` says beside the chain
        self.sources: list[tuple[Store, str]] = []
        self.tensors: list[Any] = []
        self._sizes: list[int] = []
        self._plan: Plan | None = None
        for layer in layers:
            self._add(layer)

    def _add(self, layer: Any) -> None:
        theta, alpha = layer._modules["road_theta"]._parameters, layer._modules["road_alpha"]._parameters
        sources, tensors, are_road_1 = [], [], True  # without the detours of nn.Module
        for name in layer.names_for(self.names):
            if name in layer.stages:
                variant = layer.variant[name]
                are_road_1 = are_road_1 and variant == Variant.ROAD_1
                sources += [(theta, name), (alpha, name)]
                tensors += [theta.get(name), alpha.get(name)]
                self._sizes += 2 * [len(layer.stages[name]) * parameter_size(variant, layer.out_features)]
        made = layer.kept_for_backward.of(is_road_1=are_road_1), tuple(sources), tuple(tensors)
        for of_all, of_layer in zip(self._others, made, strict=True):
            of_all.append(of_layer)
        self.sources += sources
        self.tensors += tensors

    def is_here(self) -> bool:
        """Whether the layers have these parameters now, all of each."""
        stores, names = zip(*self.sources, strict=True) if self.sources else ((), ())
        is_same = all(map(is_, map(dict.get, stores, names), self.tensors))
        return is_same and list(map(Tensor.numel, self.tensors)) == self._sizes

    def is_whole(self) -> bool:
        """Whether all parameters are here now, as plain memory, so that tables can be made before the layers run.

        Not so where each layer's are brought when it runs: sharded by FSDP or ZeRO-3, offloaded.
        """
        if self._plan is not None:  # they were, and whoever goes on with them has looked whether they are here
            return True
        return {*map(type, self.tensors)} <= {nn.Parameter} and not any(map(_is_meta, self.tensors)) and self.is_here()

    def is_trained(self) -> bool:
        """Whether a parameter is trained."""
        return any(map(_requires_grad, self.tensors))

    def are_all_trained(self) -> bool:
        """Whether every parameter is trained, so that no tables made of them without gradient are part of a graph."""
        return all(map(_requires_grad, self.tensors))

    def plan(self) -> Plan:
        """How they are made of the parameters."""
        if self._plan is None:
            self._plan = Plan([layer.slots(self.names) for layer in self._layers])
        return self._plan

    def made(self, chains: Sequence[Chain | None] | None = None) -> list[Made]:
        """What is in force in each layer, of the values of now; differentiable where a gradient is wanted."""
        return list(map(Made, self.plan().chains() if chains is None else chains, *self._others))

    def tables(self, *, has_graph: bool) -> Tables:
        """The same for all of them; has_graph: whether a gradient is wanted."""
        chains, memory = (None, []) if has_graph else self.plan().kept()
        return Tables(self, dict(zip(self._layers, self.made(chains), strict=True)), has_graph, memory)


_requires_grad, _is_meta = attrgetter("requires_grad"), attrgetter("is_meta")


class Tables(NamedTuple):
    """The tables of the layers of a layout; has_graph: whether a gradient was wanted of them; memory: see `Plan.kept`."""

    layout: Layout
    of: dict[Any, Made]
    has_graph: bool
    memory: Sequence[Tensor] = ()


class Kept:
    """How tables were made last, and those that were made without gradient. A copy of a model has made none.

    They have a stamp where it can be seen that they hold; where it cannot, they are written anew each time they are asked for, if
    every parameter is trained.

    last: how their layer rotated the last time, by these or by tables that were made for all layers.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._tables: Tables | None = None
        self._stamp: Stamp | None = None
        self.last: Last | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def layout(self, layers: Callable[[], Sequence[Any]], names: Names, changes: int) -> Layout:
        """That of the last time, where it is the same; layers: looked up only for a new one."""
        kept = self._layout
        if kept is None or kept.key != (names, changes) or not kept.is_here():
            kept = self._layout = Layout(layers(), names, changes)
        return kept

    def current(self, names: Names, changes: int) -> Tables | None:
        """The tables that are kept, if they hold, or can be made to."""
        tables, stamp = self._tables, self._stamp
        if tables is None or tables.layout.key != (names, changes):
            return None
        if stamp is not None:
            return tables if stamp.holds() else None
        if torch.is_grad_enabled() or not tables.layout.is_here():
            return None
        return self.make(tables.layout)

    def make(self, layout: Layout) -> Tables:
        """New ones, without gradient, or those that are kept with the values of now.

        Not kept is what is made while torch looks on: of a transform it is good for nothing once that is over.
        """
        tables, is_seen = self._tables, is_looked_on()
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used in training later
            if tables is not None and tables.layout is layout and not is_seen and layout.are_all_trained():
                layout.plan().write_anew(tables.memory)
            else:
                tables = layout.tables(has_graph=False)
        is_stamped = not is_seen and all(map(can_be_stamped, layout.tensors))
        self._tables = tables if is_stamped or (not is_seen and layout.are_all_trained()) else None
        self._stamp = Stamp(layout.sources) if is_stamped else None
        return tables

    def clear(self) -> None:
        """Forget them."""
        self._layout = self._tables = self._stamp = self.last = None


def are_trained(layers: Iterable[Any], names: Names) -> bool:
    """Whether a parameter of the adapters is trained."""
    return any(
        store[name].requires_grad  # of a replica of DataParallel no parameter, but a tensor with a history
        for layer in layers
        for name in layer.names_for(names)
        if name in layer.stages
        for store in (layer.road_theta, layer.road_alpha)
    )


class Last(NamedTuple):
    """How a layer rotated the last time, and by what: tables, or the `Mark` of rows in the bank (`RoadRouting.by`).

    dtype: of what was rotated.
    """

    by: object
    dtype: torch.dtype
    rotate: PreparedRotation


@contextmanager
def unseen_by_checkpoints() -> Iterator[None]:
    """Within the block nobody is told what autograd saves: a block that runs again in backward saves what it saved at first,
    and then the tables had been made before it."""

    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is):
        yield
