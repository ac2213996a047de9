"""The adapters of an adapted model in a bank: what inference with a name (or a blend) for each row reads.

An adapter is put into the bank when a row first asks for it, and again when its parameters are no longer what they were, so that
a batch of other rows costs a gather and not new tables. Where adapters are trained or the model is compiled, the layers make
their tables from the parameters themselves (`roadie.tuner.table`).

Legend: B rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from roadie.adapter import Adapter, LayerParameters
from roadie.bank.attachment import LayerRotation
from roadie.bank.bank import AdapterBank
from roadie.bank.blends import Blend
from roadie.bank.servers import Server
from roadie.kernels import Watched
from roadie.tuner.table import can_be_kept

_FEWEST_SLOTS = 16

Kind: TypeAlias = "tuple[str, int | tuple[int, ...]]"  # variant and group size, or sizes


@dataclass
class _Resident:
    """An adapter as it was when it was put into the bank."""

    kinds: list[Kind | None]  # of each layer
    parameters: list[Tensor]
    versions: list[int]
    addresses: list[int]
    watched: Watched
    storages: list[torch.UntypedStorage]  # kept, so that an address cannot come back as another's

    @classmethod
    def of(cls, kinds: list[Kind | None], parameters: list[Tensor], watched: Watched) -> _Resident:
        versions = [tensor._version for tensor in parameters]
        addresses = [tensor.data_ptr() for tensor in parameters]
        storages = [tensor.untyped_storage() for tensor in parameters]
        return cls(kinds, parameters, versions, addresses, watched, storages)

    def is_current(self, kinds: list[Kind | None], parameters: list[Tensor]) -> bool:
        return (
            len(parameters) == len(self.parameters)
            and all(new is old for new, old in zip(parameters, self.parameters, strict=True))
            and kinds == self.kinds
            and self.is_unwritten()
            and [tensor.data_ptr() for tensor in parameters] == self.addresses
            and self.watched.are_unchanged()
        )

    def is_unwritten(self) -> bool:
        """Whether no parameter was written to by an operation that torch counts."""
        return [tensor._version for tensor in self.parameters] == self.versions


class _InLayers:
    """RoAd layers rotate their own output: each is told what with."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._layers = layers

    def open(self, model: nn.Module, server: Server) -> None:
        pass

    def close(self, model: nn.Module) -> None:
        pass

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return dict(self._layers)

    def refusals(self, model: nn.Module) -> dict[str, str]:
        return {}  # looked at when the layers were adapted

    def linear(self, layer: Any) -> nn.Module:
        base: nn.Module = layer.get_base_layer()
        return base

    def device_of(self, layer: Any) -> torch.device:
        device: torch.device = layer.get_base_layer_device()
        return device

    def attach(self, layer: Any, rotation: LayerRotation) -> Callable[[], None]:
        layer.resident = rotation

        def detach() -> None:
            layer.resident = None

        return detach


class Residents:
    """The bank of one model, made when it is first needed and made anew when its layers are others or elsewhere."""

    def __init__(self) -> None:
        self._bank: AdapterBank | None = None
        self._layers: dict[str, Any] = {}
        self._seen: dict[str, _Resident] = {}
        self._lock = Lock()  # several threads may run one model

    def admit(self, model: nn.Module, layers: dict[str, Any], wishes: Sequence[str | Blend | None]) -> Tensor | None:
        """The slot of each wish, int64 on the CPU, all of it in the bank and current; hold the tensor while it is used.

        layers: the RoAd layers of `model` by path. None where parameters cannot be watched, so that nothing may be kept of them.
        """
        with self._lock:
            return self._admit(model, layers, wishes)

    def _admit(self, model: nn.Module, layers: dict[str, Any], wishes: Sequence[str | Blend | None]) -> Tensor | None:
        names = dict.fromkeys(name for wish in wishes for name in names_in(wish))
        parameters = {name: _parameters(layers, name) for name in names}
        if not all(can_be_kept(tensor) for tensors in parameters.values() for tensor in tensors):
            return None
        self._fit(model, layers, [tensor for tensors in parameters.values() for tensor in tensors])
        self._make_room(len(set(wishes)), list(names))
        self._keep_current(parameters)
        return self.bank.slots([dict(wish.weights) if isinstance(wish, Blend) else wish for wish in wishes])

    def are_unwritten(self, names: Iterable[str], bank: AdapterBank | None) -> bool:
        """Whether no parameter of adapters in `bank` was written to since, by an operation that torch counts."""
        return self._bank is bank and all(name in self._seen and self._seen[name].is_unwritten() for name in names)

    @property
    def bank(self) -> AdapterBank:
        """Where they are; there once something was admitted."""
        assert self._bank is not None
        return self._bank

    def clear(self) -> None:
        """Forget everything."""
        if self._bank is not None:
            self._bank.close()
        self._bank, self._layers = None, {}
        self._seen.clear()

    def _fit(self, model: nn.Module, layers: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """A bank for these layers where they are, whose tables round nothing."""
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in parameters) else torch.float32
        bank = self._bank
        if bank is not None:
            is_wide_enough = bank.dtype == dtype or bank.dtype == torch.float64
            if is_wide_enough and layers == self._layers and all(map(_is_at_home, layers.values())):
                return
            self.clear()
        self._layers = layers
        self._bank = AdapterBank(model, _FEWEST_SLOTS, dtype=dtype, hold=_InLayers(layers))

    def _make_room(self, num_wishes: int, names: list[str]) -> None:
        """Adapters never give way to others here: the bank grows. Those that the model no longer has go."""
        bank = self.bank
        for name in [name for name in self._seen if not _parameters(self._layers, name)]:
            self._forget(name)
        needed = len({*self._seen, *names}) + num_wishes
        if needed > bank.num_slots:
            bank.grow(2 * needed)

    def _forget(self, name: str) -> None:
        del self._seen[name]
        if name in self.bank:
            self.bank.evict(name)

    def _keep_current(self, parameters: dict[str, list[Tensor]]) -> None:
        kinds = {name: _kinds(self._layers, name) for name in parameters}
        stale = [name for name, tensors in parameters.items() if not self._is_current(name, kinds[name], tensors)]
        if stale:
            self.bank.update({name: _adapter(self._layers, name) for name in stale})
        for name, watched in zip(stale, Watched.each([parameters[name] for name in stale]), strict=True):
            self._seen[name] = _Resident.of(kinds[name], parameters[name], watched)

    def _is_current(self, name: str, kinds: list[Kind | None], parameters: list[Tensor]) -> bool:
        seen = self._seen.get(name)
        return seen is not None and name in self.bank and seen.is_current(kinds, parameters)


def names_in(wish: str | Blend | None) -> tuple[str, ...]:
    """The adapters that a row's wish reads."""
    return wish.names if isinstance(wish, Blend) else () if wish is None else (wish,)


def _parameters(layers: dict[str, Any], name: str) -> list[Tensor]:
    return [tensor for layer in layers.values() for tensor in _parameters_of(layer, name)]


def _parameters_of(layer: Any, name: str) -> list[Tensor]:
    """theta and alpha of an adapter in a layer, if it has them; looked up without the detours of nn.Module."""
    theta = layer._modules["road_theta"]._parameters.get(name)
    return [] if theta is None else [theta, layer._modules["road_alpha"]._parameters[name]]


def _kinds(layers: dict[str, Any], name: str) -> list[Kind | None]:
    return [
        (layer.variant[name], layer.group_size[name]) if name in layer.variant else None for layer in layers.values()
    ]


def _adapter(layers: dict[str, Any], name: str) -> Adapter:
    """The adapter as a value that shares the parameters' memory."""
    parts = {}
    for path, layer in layers.items():
        if name in layer.road_theta:
            parts[path] = LayerParameters(
                layer.road_theta[name], layer.road_alpha[name], layer.variant[name], layer.group_size[name]
            )
    return Adapter(parts)


def _is_at_home(layer: Any) -> bool:
    """Whether the layer's table is where the layer computes."""
    resident = layer.resident
    return resident is None or resident.table.current[0].direct.device == layer.get_base_layer_device()
