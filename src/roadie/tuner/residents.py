"""The adapters of an adapted model in a bank: what inference with a name (or a blend) for each row reads.

An adapter is put into the bank when a row first asks for it, and again when its parameters are no longer what they were, so that
a batch of other rows costs a gather and not new tables. Where adapters are trained or the model is compiled, the layers make
their tables from the parameters themselves (`roadie.tuner.tables`).

Legend: B rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadie.adapter import Adapter
from roadie.bank.attachment import LayerRotation, Site
from roadie.bank.bank import AdapterBank
from roadie.bank.blends import Blend, names_in
from roadie.bank.live import layers_with
from roadie.kernels import Place, Stamp, can_be_stamped, is_looked_on

_FEWEST_SLOTS = 16


class _Resident(NamedTuple):
    """An adapter as it was when it was put into the bank: how many parameters it had, and what they were."""

    num_places: int
    stamp: Stamp


class Held(NamedTuple):
    """Adapters in slots of a bank, one for each wish (int64 on the CPU), as they were after so many writes to it.

    Hold the slots while they are used: nothing else is written there.
    """

    names: Sequence[str]
    slots: Tensor
    bank: AdapterBank
    writes: int


class Residents:
    """The bank of one model, made when it is first needed and made anew when its layers are others or elsewhere."""

    def __init__(self) -> None:
        self._bank: AdapterBank | None = None
        self._layers: dict[str, Any] = {}
        self._given = self._layers  # the same layers, perhaps by other paths
        self._stores: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # theta and alpha of each layer
        self._seen: dict[str, _Resident] = {}
        self._additions = 0
        # What was wished for last, and is held for it; on CPUs alone, since on GPUs a lease knows the streams that read.
        self._last: tuple[list[str | Blend | None], Held] | None = None
        self._lock = Lock()  # several threads may run one model

    def admit(
        self, model: nn.Module, layers: dict[str, Any], wishes: list[str | Blend | None], additions: int
    ) -> Held | None:
        """All that is wished for in the bank, and current.

        layers: the RoAd layers of `model` by path; additions: how often one of them was given an adapter, or lost one. None
        where parameters cannot be watched, or torch looks on, so that nothing may be kept of them.
        """
        with self._lock:
            if additions != self._additions:
                self._additions = additions
                for name in [name for name, seen in self._seen.items() if seen.num_places != len(self._places(name))]:
                    self._forget(name)
            last, self._last = self._last, None
            is_as_before = last is not None and last[0] == wishes and layers is self._given
            if last is not None and not (is_as_before and self.are_current(last[1], additions)):
                last = None  # which gives its slots back
            held = self._admit(model, layers, wishes) if last is None else last[1]
            if held is not None and not held.bank.streams.devices:
                self._last = wishes, held
            return held

    def _admit(self, model: nn.Module, layers: dict[str, Any], wishes: Sequence[str | Blend | None]) -> Held | None:
        if layers is not self._given:
            if list(layers.values()) != list(self._layers.values()):
                self.clear()
                self._layers = layers
            self._given, self._stores = layers, [_stores_of(layer) for layer in layers.values()]
        names = list(dict.fromkeys([name for wish in wishes for name in names_in(wish)]))
        stale = [name for name in names if not self._is_current(name)]
        places = {name: self._places(name) for name in names} if stale or self._bank is None else {}
        if places or self._bank is None:
            if self._has_moved():
                self.clear()
            tensors = [store[key] for each in places.values() for store, key in each]
            if is_looked_on() or not all(map(can_be_stamped, tensors)):
                return None
            if not self._fit(model, tensors):
                stale = names
        self._make_room(len({*self._seen, *stale}) + len(set(wishes)))
        if stale:
            self._keep({name: places[name] for name in stale})
        bank = self.bank
        return Held(names, bank.slots_of(wishes), bank, bank.writes)

    def _places(self, name: str) -> list[Place]:
        """Where the parameters of an adapter are."""
        return [(store, name) for stores in self._stores if name in stores[0] for store in stores]

    def are_current(self, held: Held, additions: int) -> bool:
        """Whether adapters are still in these slots, as their parameters are now."""
        if held.bank is not self._bank or held.writes != held.bank.writes or additions != self._additions:
            return False
        return all(map(self._is_current, held.names))

    @property
    def bank(self) -> AdapterBank:
        """Where they are; there once something was admitted."""
        assert self._bank is not None
        return self._bank

    def clear(self) -> None:
        """Forget everything."""
        if self._bank is not None:
            self._bank.graphs.tell("the layers of the model are others, or elsewhere")
            self._bank.close()
        self._bank = self._last = None
        self._seen.clear()

    def _has_moved(self) -> bool:
        """Whether a table is not where its layer computes."""
        for layer, (theta, _) in zip(self._layers.values(), self._stores, strict=True):
            if layer.resident is not None:
                first = next(iter(theta.values()), None)
                here = layer.get_base_layer_device() if first is None else first.device
                if layer.resident.table.current[0].direct.device != here:
                    return True
        return False

    def _fit(self, model: nn.Module, parameters: Sequence[Tensor]) -> bool:
        """A bank for the layers, whose tables round nothing; whether it is the one that there was."""
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in parameters) else torch.float32
        if self._bank is not None and self._bank.dtype in (dtype, torch.float64):
            return True
        self.clear()
        sites = {path: _site(layer) for path, layer in self._layers.items()}
        self._bank = AdapterBank(model, _FEWEST_SLOTS, dtype=dtype, sites=sites)
        return False

    def _make_room(self, num_slots: int) -> None:
        """Adapters never give way to others here: the bank grows. Those that the model no longer has go."""
        gone = set(self._seen)
        for theta, _ in self._stores:
            gone -= theta.keys()
            if not gone:
                break
        for name in gone:
            self._forget(name)
        bank = self.bank
        if num_slots > bank.num_slots:
            bank.grow(2 * num_slots)

    def _keep(self, stale: dict[str, list[Place]]) -> None:
        layers = self._layers.items()
        self.bank.update({name: Adapter(layers_with(name, layers, lambda shared: shared)) for name in stale})
        for name, stamp in zip(stale, Stamp.each(list(stale.values())), strict=True):
            self._seen[name] = _Resident(len(stale[name]), stamp)

    def _forget(self, name: str) -> None:
        del self._seen[name]
        if name in self.bank:
            self.bank.evict(name)

    def _is_current(self, name: str) -> bool:
        seen, bank = self._seen.get(name), self._bank
        return seen is not None and bank is not None and name in bank and seen.stamp.holds()


def _site(layer: Any) -> Site:
    """RoAd layers rotate their own output: each is told what with."""

    def attach(rotation: LayerRotation) -> Callable[[], None]:
        layer.resident = rotation
        return lambda: setattr(layer, "resident", None)

    return Site(
        layer.get_base_layer(),
        layer.out_features,
        attach,
        layer.get_base_layer_device,
        layer.__dict__.get("site"),
    )


def _stores_of(layer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return layer._modules["road_theta"]._parameters, layer._modules["road_alpha"]._parameters
