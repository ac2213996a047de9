"""The input of a RoAd layer: ``z = R_out (W (R_in x) + b)``, for the adapters that rotate it.

R_in is held by a child of the layer, "road_input", which is a `RoadLayer` whose D is the layer's in_features. So the parameters
of R_in are called ``<layer>.road_input.road_theta.<adapter>``, and whatever finds RoAd layers finds them. A layer whose adapters
leave the input alone has no such child.

With active adapters A, B the output is rotated by A, then by B; the input by B, then by A, as if each adapter lay around the
one before: the weight is ``R_B R_A W R_inA R_inB``. x is never written to: other layers may be given the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from roadie.bank.blends import Blend, names_in
from roadie.tuner.output import KeptForBackward
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.routing import AdapterChoice
from roadie.tuner.tables import Names


class RoadInput(nn.Module, RoadLayer):
    """What rotates the input of one layer, ``[..., D]`` with D its in_features; in new memory, in the dtype of what is given.

    Rows whose adapter leaves the input alone pass as they are, bit for bit. Backward keeps the input, which layers that are
    given the same share.
    """

    def __init__(self, layer: RoadLayer, in_features: int) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # which this is a part of; as a child it would be found twice
        RoadLayer.__init__(self, in_features)
        self.kept_for_backward = KeptForBackward.INPUT
        self._routing = layer._routing
        self._disable_adapters = layer._disable_adapters
        self._active_adapter = layer._active_adapter
        self.train(layer.training)

    @property
    def base_layer(self) -> nn.Module:
        """The layer that is given what is rotated here."""
        base: nn.Module = self.__dict__["layer"].base_layer
        return base

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged into the layer's weight, of those that are here."""
        return [name for name in self.__dict__["layer"].merged_adapters if name in self.road_theta]

    def forward(self, x: Tensor) -> Tensor:
        """R_in x, for x ``[..., D]``, each row by the adapter that is in force for it."""
        if not torch.compiler.is_compiling():
            last = None if self._disable_adapters else self._kept.last
            if (
                last is not None
                and not torch.is_grad_enabled()
                and (self._routing.by.get() or self._by_itself()) is last.by
            ):
                z = torch.empty_like(x)
                if last.rotate(x, z):
                    return z
        return x if self._disable_adapters else self._rotated(x, is_fresh=False)

    def unmerge(self) -> None:
        """Take the merges of the layer back."""
        self.__dict__["layer"].unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, if it is here; which are active is for the layer to say."""
        for book in (self.variant, self.stages, self.road_theta, self.road_alpha):
            if adapter_name in book:
                del book[adapter_name]
        self._routing.additions += 1
        self._changed()

    def names_for(self, names: Names) -> Iterable[str]:
        """The active adapters the other way round; see the module."""
        applied: list[str] = list(super().names_for(names))
        return applied[::-1] if names is None else applied

    def _slots_of(self, y: Tensor, choice: AdapterChoice) -> Tensor:
        if all(map(self._rotates, choice.names)):
            return super()._slots_of(y, choice)
        here = (slot if self._rotates(wish) else -1 for slot, wish in enumerate(choice.names))
        return choice.placed(y, self.base_layer, (*here, -1))

    def _rotates(self, wish: str | Blend) -> bool:
        return any(name in self.stages for name in names_in(wish))

    def __repr__(self) -> str:
        return f"RoadInput({self.out_features}, stages={self.stages})"
