"""The tables of the RoAd layers of a model, made once a call of the model and not once a layer.

Before a call of the model all of its layers are looked at together: whether the tables that were made from their parameters
still hold (one stamp over all of them), and where they do not, or a gradient is wanted, all are made anew in a handful of
operations. While the call is running a layer's part is a lookup. A layer that is called by itself does the same for itself.

Legend: S slots, D features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
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
        return any(tensor.requires_grad for tensor in self.tensors)


class Layout:
    """How the tables of some layers for `names` are made, as long as the layers hold these parameters.

    changes: of the layers until then (`RoadRouting.changes`).
    """

    def __init__(self, layers: Sequence[Any], names: Names, changes: int = 0) -> None:
        self.names, self.changes = names, changes
        self._layers = layers
        self._facts = [_facts_of(layer, names) for layer in layers]
        self.sources = [source for _, sources, _ in self._facts for source in sources]
        self.tensors = [tensor for *_, tensors in self._facts for tensor in tensors]
        self._sizes = [size for layer in layers for size in _sizes_of(layer, names)]
        self._plan: Plan | None = None

    def is_for(self, names: Names, changes: int) -> bool:
        """Whether it is for these names, and the layers have not been changed since."""
        return self.names == names and self.changes == changes

    def are_here(self) -> bool:
        """Whether the parameters are those that the layers have now."""
        return all(map(is_, [store.get(name) for store, name in self.sources], self.tensors))

    def is_whole(self) -> bool:
        """Whether all parameters are here now, as plain memory, so that tables can be made before the layers run.

        Not so where each layer's are brought when it runs: sharded by FSDP or ZeRO-3, offloaded.
        """
        if self._plan is None and not all(type(t) is nn.Parameter and t.device.type != "meta" for t in self.tensors):
            return False
        return [tensor.numel() for tensor in self.tensors] == self._sizes

    def is_trained(self) -> bool:
        """Whether a parameter is trained."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def are_all_trained(self) -> bool:
        """Whether every parameter is trained, so that no tables made of them without gradient are part of a graph."""
        return False not in [tensor.requires_grad for tensor in self.tensors]

    def plan(self) -> Plan:
        """How they are made of the parameters."""
        if self._plan is None:
            self._plan = Plan([layer.slots(self.names) for layer in self._layers])
        return self._plan

    def made(self, chains: Sequence[Chain | None] | None = None) -> list[Made]:
        """What is in force in each layer, of the values of now; differentiable where a gradient is wanted."""
        chains = self.plan().chains() if chains is None else chains
        return [Made(chain, *facts) for chain, facts in zip(chains, self._facts, strict=True)]

    def tables(self) -> Tables:
        """The same for all of them."""
        if torch.is_grad_enabled() and self.is_trained():
            return Tables(self, dict(zip(self._layers, self.made(), strict=True)), True)
        chains, memory = self.plan().kept()
        return Tables(self, dict(zip(self._layers, self.made(chains), strict=True)), False, memory)


def _facts_of(layer: Any, names: Names) -> tuple[Keep, tuple[tuple[Store, str], ...], tuple[Any, ...]]:
    here = [name for name in layer.names_for(names) if name in layer.stages]
    stores = [layer._modules[store]._parameters for store in ("road_theta", "road_alpha")]
    sources = tuple((store, name) for name in here for store in stores)  # without the detours of nn.Module
    keep = layer.kept_for_backward.of(is_road_1=all(layer.variant[name] == Variant.ROAD_1 for name in here))
    return keep, sources, tuple(store.get(name) for store, name in sources)


def _sizes_of(layer: Any, names: Names) -> Iterator[int]:
    """How many elements theta and alpha of each adapter have."""
    for name in layer.names_for(names):
        if name in layer.stages:
            size = len(layer.stages[name]) * parameter_size(layer.variant[name], layer.out_features)
            yield from (size, size)


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
        if kept is None or not (kept.is_for(names, changes) and kept.are_here() and kept.is_whole()):
            kept = self._layout = Layout(layers(), names, changes)
        return kept

    def current(self, names: Names, changes: int) -> Tables | None:
        """The tables that are kept, if they hold, or can be made to."""
        tables, stamp = self._tables, self._stamp
        if tables is None or not tables.layout.is_for(names, changes):
            return None
        if stamp is not None:
            return tables if stamp.holds() else None
        if torch.is_grad_enabled() or not (tables.layout.are_here() and tables.layout.is_whole()):
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
                tables = layout.tables()
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
