"""An adapter that is loaded in a PEFT model, as a value; found by what its layers hold, without PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from roadie.adapter import PEFT_PREFIX, Adapter, LayerParameters
from roadie.errors import AdapterError


def on_this_process(tensor: Tensor) -> Tensor:
    """The part of a parameter that this process holds, where it is shared among several (a DTensor); differentiable."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def live_adapter(model: nn.Module, name: str, part: Callable[[Tensor], Tensor] = on_this_process) -> Adapter:
    """The adapter `name` of a model with RoAd layers inside (PEFT's or roadie's), its parameters copied.

    Paths are those of the base model; part: what is taken of a parameter that several processes share.
    Raises `AdapterError` where no layer has such an adapter.
    """
    modules = ((path.removeprefix(PEFT_PREFIX), module) for path, module in model.named_modules())
    layers = layers_with(name, modules, lambda parameter: part(parameter).detach().clone())
    if not layers:
        raise AdapterError(
            f"got adapter {name!r} of a {type(model).__name__} that has no layer with it; wanted a loaded one"
        )
    return Adapter(layers)


def layers_with(
    name: str, modules: Iterable[tuple[str, Any]], part: Callable[[Tensor], Tensor]
) -> dict[str, LayerParameters]:
    """Path -> what `part` makes of the parameters of the adapter `name`, for those of the modules that have it."""
    layers = {}
    for path, layer in modules:
        if name in getattr(layer, "road_theta", ()):
            sizes = getattr(layer, "stages", None) or layer.group_size  # PEFT's layers have one rotation
            theta, alpha = part(layer.road_theta[name]), part(layer.road_alpha[name])
            layers[path] = LayerParameters(theta, alpha, layer.variant[name], sizes[name])
    return layers
