"""Adapters of a model combined into a further one: what LoRA users know as `add_weighted_adapter`.

    blend            exp(sum of w_k log R_k), pair by pair: half of one and half of another; weights may be negative. The default.
    mean             the same with weights divided by their sum, and the magnitude that averaging angles takes away given back
    compose          R_n^{w_n} ... R_1^{w_1}: the first adapter acts first
    linear           I + sum of w_k (R_k - I): changes added, as LoRA's "cat" adds them; needs no logarithm, but halfway between
                     two turns it shrinks

Everything is computed and checked before the model is touched (`roadie.adapter_algebra`), in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper

from roadie.adapter import Adapter, LayerParameters, refuse_chains
from roadie.adapter_algebra import blend_adapters, compose_adapters, mean_adapters
from roadie.adapter_algebra.layers import Chains, combined
from roadie.bank.live import live_adapter, on_this_process
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation
from roadie.tuner.config import RoadConfig
from roadie.tuner.injection import all_or_nothing
from roadie.tuner.names import check_name
from roadie.tuner.rotating import RoadLayer


class CombinationType(str, Enum):
    """How adapters are combined; see the module."""

    BLEND = "blend"
    MEAN = "mean"
    COMPOSE = "compose"
    LINEAR = "linear"

    @classmethod
    def parse(cls, value: str | CombinationType) -> CombinationType:
        """The type named `value`; raises `ConfigError` for any other name."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(
                f"Invalid combination_type: {value}. Wanted one of {', '.join(cls)}: svd, cat, ties, dare and magnitude_prune "
                "are about matrices of low rank and single weights, of which rotations have none; use linear for cat."
            ) from None


def weighted_adapter(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: str | CombinationType
) -> Adapter:
    """What `RoadModel.add_weighted_adapter` adds, as a value; the model is only read."""
    how = CombinationType.parse(how)
    _check_names(tuner, adapters, adapter_name)
    numbers = _checked_weights(adapters, weights)
    _check_only_rotations(tuner, adapters)
    values = [_value(tuner, name) for name in adapters]
    labels = [name if list(adapters).count(name) == 1 else f"{name} ({k})" for k, name in enumerate(adapters, start=1)]
    result = _combined(how, dict(zip(labels, values, strict=True)), numbers)
    return Adapter(result.layers, {**result.config, **_of_the_model(values)})


def add_adapter(tuner: BaseTuner, adapter_name: str, adapter: Adapter) -> None:
    """Add an adapter value to the model, frozen and not active, or leave the model as it was and raise.

    What was trainable stays trainable, whatever the adapter's config says of inference: PEFT's injection sees to it.
    """
    tuner.peft_config[adapter_name] = _config(adapter)
    with all_or_nothing(tuner, tuner.model, adapter_name):
        tuner.inject_adapter(tuner.model, adapter_name)
        layers = {path: m for path, m in tuner.model.named_modules() if isinstance(m, RoadLayer)}
        with_it = {path: layer for path, layer in layers.items() if adapter_name in layer.road_theta}
        if set(with_it) != set(adapter.layers):
            raise AdapterError(
                f"got layers {sorted(set(with_it) ^ set(adapter.layers))[:3]} in the model or in the result alone; wanted them "
                "in both; name target_modules in full where one name ends in another"
            )
        for path, layer in with_it.items():
            _fill(path, layer, adapter_name, adapter.layers[path])


@torch.no_grad()
def _fill(path: str, layer: RoadLayer, name: str, values: LayerParameters) -> None:
    """Give the adapter its values, in the dtype that the layer's other adapters have."""
    others = [theta.dtype for other, theta in layer.road_theta.items() if other != name]
    dtype = reduce(torch.promote_types, others or [values.theta.dtype])
    for parameter, value in ((layer.road_theta[name], values.theta), (layer.road_alpha[name], values.alpha)):
        parameter.data = value.to(parameter.device, dtype)
        if not bool(torch.isfinite(parameter).all()):
            raise AdapterError(
                f"layer {path}: got a result too large for {parameter.dtype}; wanted finite numbers; use smaller weights"
            )


def _of_the_model(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What configs say of the model, by the first that says it: all of them are of one model."""
    said = {key: [adapter.config.get(key) for adapter in adapters] for key in _OF_THE_MODEL}
    return {key: next((value for value in values if value is not None), None) for key, values in said.items()}


_OF_THE_MODEL = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")


def _config(adapter: Adapter) -> RoadConfig:
    known = {field.name for field in fields(RoadConfig) if field.init}
    settings = {key: value for key, value in adapter.config.items() if key in known}
    return RoadConfig(**settings)


def _value(tuner: BaseTuner, name: str) -> Adapter:
    """An adapter of the model with its config, on the CPU."""
    live = live_adapter(tuner.model, name, lambda parameter: on_this_process(parameter).cpu())
    return Adapter(live.layers, tuner.peft_config[name].to_dict())


def _check_names(tuner: BaseTuner, adapters: Sequence[str], adapter_name: str) -> None:
    known = list(tuner.peft_config)
    for name in adapters:
        if name not in known:
            raise ConfigError(f"Adapter {name} does not exist. Wanted one of {known}; load it first.")
    if not adapters:
        raise ConfigError(f"Found no adapter matching the names in {list(adapters)}. Wanted some of {known}.")
    if adapter_name in known:
        raise ConfigError(
            f"got adapter_name={adapter_name!r}, which the model has already; wanted a new one; choose another, or call "
            f"delete_adapter({adapter_name!r}) first"
        )
    check_name(adapter_name)


def _checked_weights(adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    numbers = [float(weight) for weight in weights]
    if len(numbers) != len(adapters) or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"got weights {numbers} for the adapters {list(adapters)}; wanted a finite number for each")
    return numbers


def _check_only_rotations(tuner: BaseTuner, adapters: Sequence[str]) -> None:
    wrappers = [module for module in tuner.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    shared = sum(any(name in wrapper._get_available_adapters() for name in adapters) for wrapper in wrappers)
    if shared:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s). Wanted adapters that only rotate: whole modules and embeddings of tokens have no "
            "common rule; train the adapters without modules_to_save and trainable_token_indices."
        )
    biased = [name for name in adapters if getattr(tuner.peft_config[name], "bias", "none") != "none"]
    if biased:
        raise AdapterError(
            f"got {biased[0]!r}, which trains biases; wanted adapters that only rotate; train with bias='none'"
        )


def _combined(how: CombinationType, adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Adapter:
    if how is CombinationType.BLEND:
        return blend_adapters(list(adapters.values()), weights, names=list(adapters))
    if how is CombinationType.MEAN:
        return mean_adapters(list(adapters.values()), weights, magnitude_corrected=True, names=list(adapters))
    return _compose(adapters, weights) if how is CombinationType.COMPOSE else _linear(adapters, weights)


def _compose(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Adapter:
    powers = [
        blend_adapters([adapter], [weight], names=[name])
        for (name, adapter), weight in zip(adapters.items(), weights, strict=True)
    ]
    return reduce(lambda inner, outer: compose_adapters(outer=outer, inner=inner), powers)


def _linear(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Adapter:
    weight_of = dict(zip(adapters, weights, strict=True))
    for name, adapter in adapters.items():
        refuse_chains(adapter, name)

    def added(parts: Chains) -> Sequence[Rotation]:
        (like,) = next(iter(parts.values()))
        direct = 1 + sum(weight_of[name] * (rotation.direct - 1) for name, (rotation,) in parts.items())
        cross = sum(weight_of[name] * rotation.cross for name, (rotation,) in parts.items())
        return [Rotation(torch.as_tensor(direct), torch.as_tensor(cross), like.group_size)]

    return combined(adapters, added)
