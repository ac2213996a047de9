"""Whole adapters composed, inverted, strengthened and blended: each layer by `roadie.rotation` and `roadie.algebra`.

The result is an `Adapter` like any other: it can be saved, loaded by stock PEFT, admitted to a bank, trained on.

    layers          of any of the adapters; to an adapter without a layer, that layer's rotation is the identity
    variant         road_1 where every adapter has road_1 throughout, else road_2, which expresses every rotation
    group size      each layer's own, in which the adapters must agree
    precision       float64 inside; parameters are stored in float32, or float64 where an adapter has float64
    config          what all adapters say alike, with the layers, variant and group sizes of the result

Weight and exponent 1 of a single adapter give that adapter itself. Adapters with other tensors (modules_to_save, trained
biases) are refused, because only rotations have an algebra.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from roadie.adapter import Adapter, LayerParameters, resolve_group_size
from roadie.algebra import blend
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, Variant, compose, from_parameters, to_parameters

Named = Mapping[str, Adapter]

_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_GROUPING = ("group_size", "group_size_pattern", "adapt_group_size")
_NOT_KEPT = ("variant", "variant_pattern", "modules_to_save", "bias", "trainable_token_indices")


def compose_adapters(outer: Adapter, inner: Adapter) -> Adapter:
    """The adapter that does what `inner` does, then `outer`, in every layer.

    Raises `AdapterError` or `ConfigError`, naming the layer, where the adapters do not fit together, and `AdapterError` for
    an adapter with other tensors or a result too large for its dtype.
    """

    def product(parts: Mapping[str, Rotation]) -> Rotation:
        return compose(**parts) if len(parts) == 2 else next(iter(parts.values()))

    return _combined({"outer": outer, "inner": inner}, product)


def inverse_adapter(adapter: Adapter) -> Adapter:
    """The adapter that undoes `adapter`; raises `AdapterError`, naming layer and outputs, where a block is singular."""
    return power_adapter(adapter, -1.0)


def power_adapter(adapter: Adapter, exponent: float) -> Adapter:
    """`adapter` at the strength `exponent`: 0.5 for half of it, -1 for its inverse; see `roadie.algebra.power`.

    Raises `AdapterError`, naming layer and outputs, where a block has no inverse or no logarithm and would need one.
    """
    return blend_adapters([adapter], [exponent], names=["the adapter"])


def blend_adapters(adapters: Sequence[Adapter], weights: Sequence[float], *, names: Sequence[str] = ()) -> Adapter:
    """The mixture of `adapters` with `weights`, in every layer; see `roadie.algebra.blend`.

    adapters: one or more; weights: as many finite numbers; names: as many, what errors call the adapters. Adapters of weight
    0 are ignored; where nothing is left, the result is the identity.
    Raises `AdapterError` or `ConfigError`, naming adapter, layer and outputs, as `roadie.algebra.blend` does.
    """
    names = names or [f"adapter {index} of {len(adapters)}" for index in range(len(adapters))]
    if not len(adapters) == len(weights) == len(set(names)) or not adapters:
        raise AdapterError(
            f"got {len(adapters)} adapters, {len(weights)} weights and the names {list(names)}; wanted as many of each, at "
            "least one, and different names"
        )
    weight_of = dict(zip(names, map(float, weights), strict=True))
    active = {name: adapter for name, adapter in zip(names, adapters, strict=True) if weight_of[name] != 0}
    if [weight_of[name] for name in active] == [1.0]:
        return next(iter(active.values()))

    def mixture(parts: Mapping[str, Rotation]) -> Rotation:
        return blend(list(parts.values()), [weight_of[name] for name in parts], names=list(parts))

    return _combined(active or dict(zip(names, adapters, strict=True)), mixture)


def _combined(adapters: Named, combine: Callable[[Mapping[str, Rotation]], Rotation]) -> Adapter:
    """Each layer of any adapter: `combine` of the rotations of those that have it."""
    for name, adapter in adapters.items():
        _check_only_rotations(name, adapter)
    is_road_1 = all(adapter.variants == (Variant.ROAD_1,) for adapter in adapters.values())
    variant = Variant.ROAD_1 if is_road_1 else Variant.ROAD_2
    layers = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers):
        parts = {name: adapter.layers[path] for name, adapter in adapters.items() if path in adapter.layers}
        try:
            layers[path] = _layer(parts, variant, combine)
        except (AdapterError, ConfigError) as error:
            raise type(error)(f"layer {path}: {error}") from None
    return Adapter(layers, _config(list(adapters.values()), layers, variant))


def _layer(
    parts: Mapping[str, LayerParameters], variant: Variant, combine: Callable[[Mapping[str, Rotation]], Rotation]
) -> LayerParameters:
    _check_alike(parts)
    rotation = combine({name: _in_float64(layer) for name, layer in parts.items()})
    wide = any(layer.theta.dtype == torch.float64 for layer in parts.values())
    theta, alpha = (v.to(torch.float64 if wide else torch.float32) for v in to_parameters(rotation, variant))
    if not bool(torch.isfinite(alpha).all()):
        raise AdapterError(f"got a result too large for {alpha.dtype}; wanted finite numbers; use smaller weights")
    return LayerParameters(theta, alpha, variant, rotation.group_size)


def _in_float64(layer: LayerParameters) -> Rotation:
    return from_parameters(layer.theta.double(), layer.alpha.double(), layer.variant, layer.group_size)


def _check_only_rotations(name: str, adapter: Adapter) -> None:
    if adapter.other:
        raise AdapterError(
            f"{name}: got {len(adapter.other)} tensors that are no rotations ({next(iter(adapter.other))}); wanted none, "
            "because weights of modules_to_save and trained biases cannot be combined; make an Adapter of its layers alone"
        )


def _check_alike(parts: Mapping[str, LayerParameters]) -> None:
    """Raise unless the layer is paired in one way, and lies on one device, in all adapters that have it."""
    for what, error, values in (
        ("group_size", ConfigError, {name: layer.group_size for name, layer in parts.items()}),
        ("out_features", AdapterError, {name: layer.out_features for name, layer in parts.items()}),
        ("device", AdapterError, {name: str(layer.theta.device) for name, layer in parts.items()}),
    ):
        if len(set(values.values())) > 1:
            raise error(f"got {what} {values}; wanted one; {_ADVICE[what]}")


_ADVICE = {
    "group_size": "two sizes share no pair of outputs; train the adapters with one, or apply them one after the other",
    "out_features": "use adapters of one base model",
    "device": "move the parameters with .to()",
}


def _config(adapters: Sequence[Adapter], layers: Mapping[str, LayerParameters], variant: Variant) -> dict[str, Any]:
    """What all adapters say alike, and what the result is."""
    common = _common(adapters)
    config = {key: value for key, value in common.items() if key not in _NOT_KEPT}
    config |= {"peft_type": "ROAD", "variant": variant.value}
    same_layers = all(set(adapter.layers) == set(layers) for adapter in adapters)
    alike = all(key in common or not any(key in adapter.config for adapter in adapters) for key in _SELECTING)
    if not (same_layers and alike and config.get("target_modules")):
        config = {key: value for key, value in config.items() if key not in _SELECTING}
        config["target_modules"] = sorted(layers)
    if not _describes(config, layers):
        config = {key: value for key, value in config.items() if key not in _GROUPING} | _group_sizes(layers)
    return config


def _common(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The keys that all configs have, with values that are equal (lists of modules in any order)."""
    first, *others = (adapter.config for adapter in adapters)
    return {
        key: value
        for key, value in first.items()
        if all(key in other and _comparable(other[key]) == _comparable(value) for other in others)
    }


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(map(repr, value))
    # Of patterns the first that matches counts, so that their order matters.
    return list(value.items()) if isinstance(value, Mapping) else value


def _describes(config: Mapping[str, Any], layers: Mapping[str, LayerParameters]) -> bool:
    try:
        return all(
            resolve_group_size(config, path, layer.out_features) == layer.group_size for path, layer in layers.items()
        )
    except ConfigError:
        return False


def _group_sizes(layers: Mapping[str, LayerParameters]) -> dict[str, Any]:
    """One group size for all, or the most frequent one and a pattern a layer: longer paths first, which end in shorter ones."""
    (size, count), *_ = Counter(layer.group_size for layer in layers.values()).most_common()
    if count == len(layers):
        return {"group_size": size}
    return {
        "group_size": size,
        "group_size_pattern": {re.escape(path): layers[path].group_size for path in _longest_first(layers)},
    }


def _longest_first(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda path: (-len(path), path))
