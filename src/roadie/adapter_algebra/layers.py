"""Adapters layer by layer: what an operation on rotations makes of whole adapters, and what the config of the result says.

layers          of any of the adapters; to an adapter without a layer, that layer's rotation is the identity
variant         the smallest that holds the result exactly: road_1 where both rows of every pair agree, else road_2
group size      of each layer, that in which the adapters turn there
chains          are combined as `roadie.algebra.chains` says; a plain adapter has chains of one rotation
inputs          a rotation of a layer's input is combined with those of the same input; products there are in reverse order,
                because ``R2 (R1 W Q1) Q2`` has ``Q1 Q2``
precision       float64 inside; parameters are stored in float32, or float64 where an adapter has float64
config          what all adapters say alike, with the layers, variant and group sizes of the result
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from roadie.adapter import (
    INPUT_SUFFIX,
    Adapter,
    LayerParameters,
    experts_kind,
    is_input,
    layer_of,
    refuse_chains,
    resolve_stages,
    rotates_input,
)
from roadie.algebra import in_one_pairing
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, Variant, chain_from_parameters, swap_unsigned, to_parameters

Named = Mapping[str, Adapter]
Rotations = Mapping[str, Rotation]
Chains = Mapping[str, tuple[Rotation, ...]]
OfChains = Callable[[Chains], Sequence[Rotation]]
T = TypeVar("T")

_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_GROUPING = (
    *("group_size", "group_size_pattern", "adapt_group_size", "stages", "stages_pattern"),
    *("input_stages", "input_stages_pattern"),
)
_NOT_KEPT = ("variant", "variant_pattern", "modules_to_save", "bias", "trainable_token_indices", "target_experts")


def combined(adapters: Named, combine: OfChains, *, at_inputs: OfChains | None = None) -> Adapter:
    """Each layer of any adapter: `combine` of the chains of those that have it, by name, in float64.

    Where no adapter has a chain of several stages, they are chains of one rotation, all in one pairing.
    at_inputs: what stands for it at the inputs of layers; None: the same.
    Raises `AdapterError` or `ConfigError`, naming the layer, where the adapters do not fit together or a result is too large.
    """
    single = all(len(layer.stages) == 1 for adapter in adapters.values() for layer in adapter.layers.values())

    def chain(path: str, parts: Mapping[str, LayerParameters]) -> Sequence[Rotation]:
        chains = {name: chain_in_float64(name, layer) for name, layer in parts.items()}
        if single:
            paired = in_one_pairing({name: rotation for name, (rotation,) in chains.items()})
            chains = {name: (rotation,) for name, rotation in paired.items()}
        return at_inputs(chains) if at_inputs is not None and is_input(path) else combine(chains)

    chains = _over_parts(adapters, chain)
    all_agree = all(rows_agree(rotation) for rotations in chains.values() for rotation in rotations)
    variant = Variant.ROAD_1 if all_agree else Variant.ROAD_2
    layers = {}
    for path, rotations in chains.items():
        dtypes = {adapter.layers[path].theta.dtype for adapter in adapters.values() if path in adapter.layers}
        with about_layer(path):
            layers[path] = stored_chain(rotations, variant, torch.float64 if torch.float64 in dtypes else torch.float32)
    return Adapter(layers, result_config(list(adapters.values()), layers, variant))


def over_layers(adapters: Named, measure: Callable[[Rotations], T]) -> dict[str, T]:
    """Module path -> `measure` of the rotations, by name and in one pairing, of the adapters that have the layer.

    Raises `AdapterError` or `ConfigError`, naming the layer, where the adapters do not fit together or are not finite, and
    where one has a chain of several stages.
    """
    for name, adapter in adapters.items():
        refuse_chains(adapter, name)

    def measured(_: str, parts: Mapping[str, LayerParameters]) -> T:
        return measure(in_one_pairing({name: in_float64(name, layer) for name, layer in parts.items()}))

    return _over_parts(adapters, measured)


def _over_parts(adapters: Named, measure: Callable[[str, Mapping[str, LayerParameters]], T]) -> dict[str, T]:
    for name, adapter in adapters.items():
        _check_only_rotations(name, adapter)
    found = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers):
        parts = {name: adapter.layers[path] for name, adapter in adapters.items() if path in adapter.layers}
        with about_layer(path):
            _check_one_device(parts)
            _check_one_width(parts)
            found[path] = measure(path, parts)
    return found


@contextmanager
def about_layer(path: str) -> Iterator[None]:
    """Errors inside name the layer."""
    try:
        yield
    except (AdapterError, ConfigError) as error:
        raise type(error)(f"layer {path}: {error}") from None


def in_float64(name: str, layer: LayerParameters) -> Rotation:
    """The layer's one rotation in float64; raises `AdapterError`, naming the adapter, where a parameter is not finite."""
    _ = layer.group_size  # raises where there are several
    return chain_in_float64(name, layer)[0]


def chain_in_float64(name: str, layer: LayerParameters) -> tuple[Rotation, ...]:
    """The layer's chain, as `in_float64`."""
    if not bool((torch.isfinite(layer.theta) & torch.isfinite(layer.alpha)).all()):
        raise AdapterError(
            f"{name}: got parameters that are not finite; wanted finite numbers; train the adapter again"
        )
    return chain_from_parameters(layer.theta.double(), layer.alpha.double(), layer.variant, layer.stages)


def stored(rotation: Rotation, variant: Variant, dtype: torch.dtype) -> LayerParameters:
    """The parameters of a rotation that `variant` holds exactly; raises `AdapterError` where they are too large for `dtype`."""
    theta, alpha = (vector.to(dtype) for vector in to_parameters(rotation, variant))
    if not bool(torch.isfinite(alpha).all()):
        raise AdapterError(f"got a result too large for {dtype}; wanted finite numbers; use smaller weights")
    return LayerParameters(theta, alpha, variant, rotation.group_size)


def stored_chain(chain: Sequence[Rotation], variant: Variant, dtype: torch.dtype) -> LayerParameters:
    """`stored` of a chain, whose parameters lie end to end."""
    parts = [stored(rotation, variant, dtype) for rotation in chain]
    theta, alpha = torch.cat([part.theta for part in parts]), torch.cat([part.alpha for part in parts])
    return LayerParameters(theta, alpha, variant, [rotation.group_size for rotation in chain])


def rows_agree(rotation: Rotation) -> bool:
    """Whether both rows of every pair are equal, so that road_1 holds the rotation exactly."""
    return all(torch.equal(v, swap_unsigned(v, rotation.group_size)) for v in (rotation.direct, rotation.cross))


def _check_only_rotations(name: str, adapter: Adapter) -> None:
    if adapter.other:
        raise AdapterError(
            f"{name}: got {len(adapter.other)} tensors that are no rotations ({next(iter(adapter.other))}); wanted none, "
            "because weights of modules_to_save and trained biases cannot be combined; make an Adapter of its layers alone"
        )


def _check_one_device(parts: Mapping[str, LayerParameters]) -> None:
    devices = {name: str(layer.theta.device) for name, layer in parts.items()}
    if len(set(devices.values())) > 1:
        raise AdapterError(f"got device {devices}; wanted one; move the parameters with .to()")


def _check_one_width(parts: Mapping[str, LayerParameters]) -> None:
    widths = {name: layer.out_features for name, layer in parts.items()}
    if len(set(widths.values())) > 1:
        raise AdapterError(f"got out_features {widths}; wanted one; use adapters of one base model")


def result_config(
    adapters: Sequence[Adapter], layers: Mapping[str, LayerParameters], variant: Variant
) -> dict[str, Any]:
    """What all adapters say alike, and what the result is."""
    common = _common(adapters)
    config = {key: value for key, value in common.items() if key not in _NOT_KEPT}
    config |= {"peft_type": "ROAD", "variant": variant.value}
    targets = _targets(layers)
    same_layers = all(_targets(adapter.layers) == targets for adapter in adapters)
    alike = all(key in common or not any(key in adapter.config for adapter in adapters) for key in _SELECTING)
    if not (same_layers and alike and config.get("target_modules")):
        config = {key: value for key, value in config.items() if key not in _SELECTING}
        config["target_modules"] = targets
    kind = _kind_of_experts(layers)
    return grouped_config(config if kind is None else {**config, "target_experts": kind}, layers)


def _kind_of_experts(layers: Iterable[str]) -> str | None:
    """What target_experts is for these sites; raises `AdapterError` where adapters of both kinds were combined."""
    first, *others = {experts_kind(path) for path in layers} - {None} or {None}
    if others:
        raise AdapterError(
            "got adapters of which some rotate each expert and others share a rotation; wanted one kind: their products are of "
            "neither; combine those of one target_experts"
        )
    return first


def _targets(layers: Iterable[str]) -> list[str]:
    """The layers whose output or input is rotated; stacked experts are none."""
    return sorted({layer_of(path) for path in layers if experts_kind(path) is None})


def grouped_config(config: Mapping[str, Any], layers: Mapping[str, LayerParameters]) -> dict[str, Any]:
    """`config`, with the group sizes of `layers` where it says others."""
    if _describes(config, layers):
        return dict(config)
    return {key: value for key, value in config.items() if key not in _GROUPING} | _group_sizes(layers)


def _common(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The keys that all configs have, with values that are equal (lists of modules in any order)."""
    first, *others = (adapter.config for adapter in adapters)
    return {
        key: value
        for key, value in first.items()
        if all(key in other and _comparable(key, other[key]) == _comparable(key, value) for other in others)
    }


def _comparable(key: str, value: Any) -> Any:
    if key not in ("stages", "input_stages") and isinstance(value, (list, tuple, set, frozenset)):
        return sorted(map(repr, value))
    # Of patterns the first that matches counts, so that their order matters.
    return list(value.items()) if isinstance(value, Mapping) else value


def _describes(config: Mapping[str, Any], layers: Mapping[str, LayerParameters]) -> bool:
    try:
        return all(
            resolve_stages(config, path, layer.out_features) == layer.stages for path, layer in layers.items()
        ) and all(rotates_input(config, path) == (f"{path}{INPUT_SUFFIX}" in layers) for path in _targets(layers))
    except ConfigError:
        return False


def _group_sizes(layers: Mapping[str, LayerParameters]) -> dict[str, Any]:
    """One group size for all, or the most frequent one and a pattern a layer: longer paths first, which end in shorter ones."""
    outputs = {path: layer.stages for path, layer in layers.items() if not is_input(path)}
    return (_output_sizes(outputs) if outputs else {}) | _input_sizes(layers)


def _output_sizes(stages_of: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    (stages, count), *_ = Counter(stages_of.values()).most_common()
    usual = {"group_size": stages[0]} if len(stages) == 1 else {"stages": list(stages)}
    if count == len(stages_of):
        return usual
    if all(len(stages) == 1 for stages in stages_of.values()):
        return usual | {
            "group_size_pattern": {re.escape(path): stages_of[path][0] for path in _longest_first(stages_of)}
        }
    return usual | {"stages_pattern": {re.escape(path): list(stages_of[path]) for path in _longest_first(stages_of)}}


def _input_sizes(layers: Mapping[str, LayerParameters]) -> dict[str, Any]:
    """As `_group_sizes`, of inputs; nothing where there are none, and an empty list in the pattern for a layer without."""
    inputs = {layer_of(path): layer.stages for path, layer in layers.items() if is_input(path)}
    stages_of = {path: list(inputs.get(path, ())) for path in _targets(layers)}
    if not inputs:
        return {}
    if len(set(inputs.values())) == 1 and len(inputs) == len(stages_of):
        return {"input_stages": next(iter(stages_of.values()))}
    return {"input_stages_pattern": {re.escape(path): stages_of[path] for path in _longest_first(stages_of)}}


def _longest_first(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda path: (-len(path), path))
