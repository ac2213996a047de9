"""The RoAd layers of a model and their parameters; found by what they hold, without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from roadie.errors import AdapterError

STORES = ("road_theta", "road_alpha")


def road_layers(model: nn.Module) -> dict[str, Any]:
    """The RoAd layers of a model by path, in its order; raises `AdapterError` where it has none."""
    layers = {path: module for path, module in model.named_modules() if hasattr(module, STORES[0])}
    if not layers:
        raise AdapterError(f"got a {type(model).__name__} without RoAd layers; wanted one of roadie.get_peft_model")
    return layers


def stored_parameters(model: nn.Module) -> Iterator[tuple[nn.ParameterDict, str, nn.Parameter]]:
    """theta and alpha of all adapters: the dictionary that holds each, its key, and the parameter; raises as `road_layers`."""
    for layer in road_layers(model).values():
        for store in STORES:
            parameters: nn.ParameterDict = getattr(layer, store)
            for name in list(parameters):
                yield parameters, name, parameters[name]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """theta and alpha of all adapters of a model, in its order; raises as `road_layers`."""
    return [parameter for _, _, parameter in stored_parameters(model)]
