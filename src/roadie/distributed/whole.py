"""Whole adapters out of models that several processes share, and into them.

adapter = full_adapter(model)               in all processes, which gather what is in parts
if rank == 0: roadie.checkpoint.save(adapter, "my-adapter")
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from roadie.adapter import PEFT_PREFIX, Adapter
from roadie.bank.live import live_adapter
from roadie.distributed.layers import STORES, adapter_parameters, road_layers
from roadie.errors import AdapterError, ConfigError


def full_adapter(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """The adapter `adapter_name` of a model, whole, on the CPU, with its config; all processes must call it.

    model: adapted, as it is or in DDP, FSDP2, tensor parallel or under DeepSpeed's ZeRO-3. What is trained besides rotations
    (whole modules, biases) is not part of it. Raises `AdapterError` where no layer has such an adapter.
    """
    inner = _unwrapped(model)
    layers = live_adapter(inner, adapter_name, lambda tensor: _whole(tensor).cpu()).layers
    configs = getattr(inner, "peft_config", {})
    config = configs[adapter_name].to_dict() if adapter_name in configs else {}
    return Adapter(layers, {**config, "inference_mode": True} if config else {})


def load_full_adapter(model: nn.Module, adapter: Adapter, adapter_name: str = "default") -> None:
    """Put a whole adapter into the layers of a model, each process its part; in all processes, with the same adapter.

    The model has an adapter `adapter_name` of the same layers, variants and group sizes already (`roadie.get_peft_model`).
    Raises `AdapterError`, with nothing changed, where these differ; `ConfigError` under DeepSpeed, whose optimizer has copies.
    """
    if any(hasattr(parameter, "ds_id") for parameter in adapter_parameters(_unwrapped(model))):
        raise ConfigError(
            "got a model that DeepSpeed has taken over, whose optimizer keeps copies of the parameters; wanted one before that; "
            "load the adapter before deepspeed.initialize"
        )
    layers = {path.removeprefix(PEFT_PREFIX): layer for path, layer in road_layers(_unwrapped(model)).items()}
    mine = {path: layer for path, layer in layers.items() if adapter_name in layer.road_theta}
    if mine.keys() != adapter.layers.keys():
        differing = sorted(mine.keys() ^ adapter.layers.keys())
        raise AdapterError(
            f"got an adapter that differs from {adapter_name!r} in the layers {', '.join(differing)}; wanted the same layers; "
            "adapt the model with the config of the adapter"
        )
    pairs = [
        (getattr(mine[path], store)[adapter_name], value)
        for path, given in adapter.layers.items()
        for store, value in zip(STORES, (given.theta, given.alpha), strict=True)
    ]
    for path, given in adapter.layers.items():
        layer = mine[path]
        here = (layer.variant[adapter_name], layer.stages[adapter_name])
        if here != (given.variant, given.stages) or layer.road_theta[adapter_name].shape != given.theta.shape:
            raise AdapterError(
                f"{path}: got {given.variant.value} with group sizes {given.stages} and {given.theta.numel()} values; wanted "
                f"{here[0]} with {here[1]} and {layer.road_theta[adapter_name].numel()}; use the config of the adapter"
            )
    with torch.no_grad():
        for parameter, value in pairs:
            _put(parameter, value)


def _unwrapped(model: nn.Module) -> Any:
    """The adapted model inside of DDP or DeepSpeed's engine."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model


def _whole(tensor: Any) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    if gather is not None:
        return cast(Tensor, gather())
    if not hasattr(tensor, "ds_id"):
        return cast(Tensor, tensor)
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return cast(Tensor, tensor.detach().clone())


def _put(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
