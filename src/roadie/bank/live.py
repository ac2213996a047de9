"""An adapter that is loaded in a PEFT model, as a value; found by what its layers hold, without PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError

_PREFIX = "base_model.model."  # of a PeftModel


def live_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter `name` of a model with RoAd layers inside (PEFT's or roadie's), its parameters copied.

    Paths are those of the base model. Raises `AdapterError` where no layer has such an adapter.
    """
    layers = {}
    for path, module in model.named_modules():
        if name not in getattr(module, "road_theta", ()):
            continue
        layer: Any = module
        theta, alpha = (store[name].detach().clone() for store in (layer.road_theta, layer.road_alpha))
        layers[path.removeprefix(_PREFIX)] = LayerParameters(theta, alpha, layer.variant[name], layer.group_size[name])
    if not layers:
        raise AdapterError(
            f"got adapter {name!r} of a {type(model).__name__} that has no layer with it; wanted a loaded one"
        )
    return Adapter(layers)
