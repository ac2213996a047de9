"""Many adapters of one base model beside each other: how far apart they are, and what two of them share.

Everything is measured on C = R - I, what an adapter adds to the identity, which is 0 in a layer that it lacks:

    distance     ||C_a - C_b||_F / sqrt(D), with D the outputs of all layers that either has: `roadie.distance`
    alignment    <C_a, C_b> / (||C_a||_F ||C_b||_F): 1 where two change alike, 0 where they have nothing in common

Two group sizes share no pair, so that their cross parts have the inner product 0; nothing has to be converted.

Shapes: ``A`` adapters, ``F`` features of one layer (direct - 1, and cross once a group size), ``D`` its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roadie import embedded
from roadie.adapter import Adapter
from roadie.errors import AdapterError, ConfigError
from roadie.inspect.blocks import rotation_of
from roadie.inspect.positions import Position, positions_of

TOP_SHARE = 0.1


@dataclass(frozen=True)
class LayerAgreement:
    """How alike the adapters that have a layer change it: the mean alignment of all pairs; None with fewer than two."""

    path: str
    depth: int | None
    kind: str
    adapters: int
    alignment: float | None


@dataclass(frozen=True)
class LayerSharing:
    """One layer of two adapters: how much each changes it, and how alike; alignment None where one changes nothing."""

    path: str
    depth: int | None
    kind: str
    first_change: float
    second_change: float
    distance: float
    alignment: float | None


@dataclass(frozen=True)
class Sharing:
    """What two adapters share. alignment, distance: over all layers that either has.

    top_overlap: of the tenth of all outputs that the first changes most, the share that is in the second's tenth too;
    chance would be 0.1. None where either changes fewer outputs than a tenth.
    """

    first: str
    second: str
    alignment: float | None
    distance: float
    top_overlap: float | None
    layers: tuple[LayerSharing, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Adapters beside each other: distance and alignment ``[A][A]`` in the order of the names.

    alignment: None where an adapter changes nothing. warnings: what makes the comparison doubtful.
    """

    names: tuple[str, ...]
    distance: tuple[tuple[float, ...], ...]
    alignment: tuple[tuple[float | None, ...], ...]
    layers: tuple[LayerAgreement, ...]
    closest: Sharing
    warnings: tuple[str, ...]


def compare(adapters: Mapping[str, Adapter], positions: Mapping[str, Position] | None = None) -> Comparison:
    """Two adapters or more, by name, beside each other, and the closest two of them in detail.

    Raises `ConfigError` for fewer than two, `AdapterError` where a layer has another number of outputs in another adapter
    (they belong to different base models) or parameters are not finite. Base models that merely have different names
    are a warning of the result.
    """
    if len(adapters) < 2:
        raise ConfigError(f"got {len(adapters)} adapters; wanted two at least to compare; name another one")
    paths = list(dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers))
    _check_outputs(adapters, paths)
    positions = positions or positions_of(paths)
    squared, inner, agreements = _sums(adapters, paths, positions)
    distance = np.sqrt(squared / _shared_outputs(adapters, paths))
    names = tuple(adapters)
    first, second = _closest(distance)
    return Comparison(
        names=names,
        distance=tuple(map(tuple, distance.tolist())),
        alignment=tuple(tuple(map(_none_if_nan, row)) for row in _alignments(inner).tolist()),
        layers=tuple(agreements),
        closest=share(adapters, names[first], names[second], positions),
        warnings=warnings_of(adapters),
    )


def share(
    adapters: Mapping[str, Adapter], first: str, second: str, positions: Mapping[str, Position] | None = None
) -> Sharing:
    """What the adapters named `first` and `second` share, layer by layer; raises as `compare` does."""
    pair = {name: adapters[name] for name in (first, second)}
    paths = list(dict.fromkeys(path for adapter in pair.values() for path in adapter.layers))
    _check_outputs(pair, paths)
    positions = positions or positions_of(paths)
    features = {path: _features(pair, path) for path in paths}
    layers = tuple(_layer_sharing(path, positions[path], features[path], _outputs(pair, path)) for path in paths)
    total = sum((each @ each.mT for each in features.values()), torch.zeros(2, 2, dtype=torch.float64)).numpy()
    outputs = [_outputs(pair, path) for path in paths]
    squared = sum(layer.distance**2 * size for layer, size in zip(layers, outputs, strict=True))
    return Sharing(
        first=first,
        second=second,
        alignment=_none_if_nan(float(_alignments(total)[0, 1])),
        distance=math.sqrt(squared / sum(outputs)),
        top_overlap=_top_overlap(
            [_output_changes(features[path], size) for path, size in zip(paths, outputs, strict=True)]
        ),
        layers=layers,
        only_first=tuple(path for path in paths if path not in adapters[second].layers),
        only_second=tuple(path for path in paths if path not in adapters[first].layers),
    )


def warnings_of(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """What makes a comparison of `adapters` doubtful: different names of base models, no layer in common, other tensors."""
    return (*_base_warning(adapters), *_layer_warning(adapters), *_tensor_warning(adapters))


def _base_warning(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    names = {name: embedded.name_here(each.base_model_name) for name, each in adapters.items() if each.base_model_name}
    different = sorted(set(names.values()))
    if len(different) < 2:
        return ()
    says = "; ".join(
        f"{next(name for name in names if names[name] == base)} was made for {base}" for base in different[:4]
    )
    more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
    return (
        f"The adapters name {len(different)} base models: {says}{more}. Across base models a distance means nothing.",
    )


def _layer_warning(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    common = set.intersection(*(set(adapter.layers) for adapter in adapters.values()))
    if common or len(adapters) < 2:
        return ()
    return ("No layer is adapted by all adapters. A layer that an adapter lacks counts as unchanged by it.",)


def _tensor_warning(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    carrying = [name for name, adapter in adapters.items() if adapter.other]
    if not carrying:
        return ()
    return (
        f"{_listed(carrying)}: other tensors (modules_to_save, trained biases) are counted in the size, and looked at nowhere.",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_outputs(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> None:
    for path in paths:
        sizes = {
            name: adapter.layers[path].out_features for name, adapter in adapters.items() if path in adapter.layers
        }
        smallest, largest = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
        if sizes[smallest] != sizes[largest]:
            bases = {name: adapters[name].base_model_name or "a base model not named" for name in (smallest, largest)}
            raise AdapterError(
                f"layer {path}: got {sizes[smallest]} outputs in {smallest} (made for {bases[smallest]}) and {sizes[largest]} "
                f"in {largest} (made for {bases[largest]}); wanted adapters of one base model; leave one of them out"
            )


def _outputs(adapters: Mapping[str, Adapter], path: str) -> int:
    return next(adapter.layers[path].out_features for adapter in adapters.values() if path in adapter.layers)


def _shared_outputs(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> Any:
    """The outputs of the layers that either of two adapters has, ``[A, A]``."""
    has = np.array([[path in adapter.layers for path in paths] for adapter in adapters.values()])
    sizes = np.array([_outputs(adapters, path) for path in paths])
    return sizes.sum() - (~has * sizes) @ ~has.T


def _features(adapters: Mapping[str, Adapter], path: str) -> Tensor:
    """C of every adapter in one layer, ``[A, F]`` float64: direct - 1, then cross in the columns of its group size."""
    have = {name: adapter.layers[path] for name, adapter in adapters.items() if path in adapter.layers}
    column_of = {size: 1 + n for n, size in enumerate(sorted({layer.group_size for layer in have.values()}))}
    features = torch.zeros(len(adapters), 1 + len(column_of), _outputs(adapters, path), dtype=torch.float64)
    for row, name in enumerate(adapters):
        if name in have:
            rotation = rotation_of(have[name], f"{name}, layer {path}")
            features[row, 0] = rotation.direct - 1
            features[row, column_of[rotation.group_size]] = rotation.cross
    return features.flatten(1)


def _sums(
    adapters: Mapping[str, Adapter], paths: Sequence[str], positions: Mapping[str, Position]
) -> tuple[Any, Any, list[LayerAgreement]]:
    """Squared distances and inner products ``[A, A]`` summed over the layers, and how alike each layer is changed."""
    squared = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    inner = torch.zeros_like(squared)
    agreements = []
    for path in paths:
        features = _features(adapters, path)
        # Not from inner products: those would round small distances away.
        squared += torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        products = features @ features.mT
        inner += products
        agreements.append(_agreement(path, positions[path], adapters, products.numpy()))
    return squared.numpy(), inner.numpy(), agreements


def _agreement(path: str, position: Position, adapters: Mapping[str, Adapter], products: Any) -> LayerAgreement:
    pairs = _alignments(products)[np.triu_indices(len(products), k=1)]
    known = pairs[~np.isnan(pairs)]
    having = sum(path in adapter.layers for adapter in adapters.values())
    return LayerAgreement(path, position.depth, position.kind, having, float(known.mean()) if len(known) else None)


def _alignments(inner: Any) -> Any:
    """Cosines ``[A, A]`` from inner products; NaN where a length is 0."""
    lengths = np.sqrt(np.diag(inner))
    both = np.outer(lengths, lengths)
    return np.clip(np.divide(inner, both, out=np.full_like(inner, np.nan), where=both > 0), -1, 1)


def _closest(distance: Any) -> tuple[int, int]:
    apart = distance + np.diag(np.full(len(distance), np.inf))
    first, second = np.unravel_index(np.argmin(apart), apart.shape)
    return int(min(first, second)), int(max(first, second))


def _layer_sharing(path: str, position: Position, features: Tensor, outputs: int) -> LayerSharing:
    first, second = features
    lengths = [float(each.norm()) for each in (first, second)]
    alignment = float(first @ second) / (lengths[0] * lengths[1]) if all(lengths) else None
    root = math.sqrt(outputs)
    return LayerSharing(
        path=path,
        depth=position.depth,
        kind=position.kind,
        first_change=lengths[0] / root,
        second_change=lengths[1] / root,
        distance=float((first - second).norm()) / root,
        alignment=None if alignment is None else max(-1.0, min(1.0, alignment)),
    )


def _output_changes(features: Tensor, outputs: int) -> Tensor:
    """How much each output is changed, squared: ``[2, D]``."""
    return features.view(2, -1, outputs).square().sum(1)


def _top_overlap(changes: Sequence[Tensor]) -> float | None:
    """Of the outputs that the first changes most, the share that is among those the second changes most."""
    both = torch.cat(list(changes), dim=1)
    top = max(1, int(both.shape[1] * TOP_SHARE))
    if bool(((both > 0).sum(1) < top).any()):
        return None
    first, second = (set(each.topk(top).indices.tolist()) for each in both)
    return len(first & second) / top


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
