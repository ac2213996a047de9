"""Subspaces: adapters that change a share of the pairs of every layer and leave the others alone.

The pairs of a rotation do not mix, so that adapters whose pairs are disjoint commute and lose nothing by being joined
(Liao & Monz 2024, arXiv 2409.00119, section 4.3):

    restrict(a, "1/2")      a on the first half of the pairs of every layer, the identity on the others
    split(a, 2)             both halves of a;  join(split(a, n)) is a, parameter by parameter
    join([a, b])            does what a does on a's pairs and what b does on b's: a after b, b after a

An adapter of a share is an adapter like any other. `roadie train --share`, a job's ``share`` in `roadie train-many` and
`roadie.train_only` train one; there the parameters of the other pairs keep every bit.

Legend: D out features, P = D/2 pairs in the order of `roadie.rotation.to_blocks`, n parameters of theta (and of alpha).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from roadie.adapter import Adapter, LayerParameters, stages_of
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant, pairs_of_parameters
from roadie.share import Layout, Share, shares

__all__ = ["Layout", "Share", "join", "restrict", "shares", "split", "touched_pairs", "trained_places"]


def restrict(adapter: Adapter, share: Share | str) -> Adapter:
    """`adapter` on the pairs of `share` ("1/2", "1/2 interleaved"), and the identity on all others.

    Raises `ConfigError` for what is no share, `AdapterError` for an adapter with other tensors than rotations.
    """
    share = Share.parse(share)
    return _mapped(adapter, lambda layer: _where(places_of_share(share, layer), layer))


def split(adapter: Adapter, count: int, layout: Layout | str = Layout.CONTIGUOUS) -> tuple[Adapter, ...]:
    """`adapter` in `count` shares, whose `join` it is; raises as `restrict` does."""
    return tuple(restrict(adapter, share) for share in shares(count, layout))


def join(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter that does on every pair what the one of `adapters` does that changes it.

    adapters: one or more, alike in layers, variants and group sizes; parameters are taken over bit for bit.
    Raises `AdapterError`, naming the layer, where two of them change one pair or have other tensors than rotations, and
    `ConfigError` where they are not alike.
    """
    if not adapters:
        raise AdapterError("got no adapters; wanted at least one")
    first, *others = adapters
    for number, adapter in enumerate(others, start=2):
        _check_alike(first, adapter, number)
    layers = {path: _joined(path, [adapter.layers[path] for adapter in adapters]) for path in first.layers}
    return Adapter(layers, _config(adapters), _no_others(*adapters))


def touched_pairs(layer: LayerParameters) -> Tensor:
    """Which pairs have a parameter that is not the identity's (theta 0, alpha 1): bool ``[P]``."""
    touched = torch.zeros(layer.out_features // 2, dtype=torch.bool, device=layer.theta.device)
    touched[_pairs(layer)[(layer.theta != 0) | (layer.alpha != 1)]] = True
    return touched


def trained_places(
    pairs: Share | Tensor,
    variant: str | Variant,
    out_features: int,
    group_size: int | Sequence[int],
    *,
    device: object = None,
) -> Tensor:
    """Which places of theta (and of alpha) belong to `pairs`, a share or bool ``[P]``: bool ``[n]``.

    group_size: as in `LayerParameters`. Raises `ConfigError` for a mask of another shape or dtype, and for a chain of several
    rotations.
    """
    stages = stages_of(group_size)
    if len(stages) > 1:
        got = f"share={str(pairs)!r}" if isinstance(pairs, Share) else "a mask"
        raise ConfigError(
            f"got {got} with several rotations in a row (stages {list(stages)}); wanted one rotation, whose pairs can be chosen; "
            "leave out the pairs, or the stages"
        )
    num_pairs = out_features // 2
    place_pairs = pairs_of_parameters(variant, out_features, stages[0], device=device)
    if isinstance(pairs, Share):
        chosen = torch.zeros(num_pairs, dtype=torch.bool, device=place_pairs.device)
        chosen[list(pairs.pairs(num_pairs))] = True
    else:
        chosen = pairs.to(place_pairs.device)
    if chosen.dtype != torch.bool or chosen.shape != (num_pairs,):
        raise ConfigError(
            f"got a mask {chosen.dtype} {tuple(chosen.shape)} for {out_features} outputs; wanted torch.bool [{num_pairs}], "
            "a value for each pair"
        )
    return chosen[place_pairs]


def places_of_share(share: Share, layer: LayerParameters) -> Tensor:
    """`trained_places` of a share in a layer."""
    device = layer.theta.device
    return trained_places(share, layer.variant, layer.out_features, layer.stages, device=device)


def _pairs(layer: LayerParameters) -> Tensor:
    return pairs_of_parameters(layer.variant, layer.out_features, layer.group_size, device=layer.theta.device)


def _where(places: Tensor, layer: LayerParameters) -> LayerParameters:
    """`layer` at `places`, the identity elsewhere."""
    theta = torch.where(places, layer.theta, torch.zeros_like(layer.theta))
    alpha = torch.where(places, layer.alpha, torch.ones_like(layer.alpha))
    return LayerParameters(theta, alpha, layer.variant, layer.group_size)


def _mapped(adapter: Adapter, change: Callable[[LayerParameters], LayerParameters]) -> Adapter:
    others = _no_others(adapter)
    return Adapter({path: change(layer) for path, layer in adapter.layers.items()}, adapter.config, others)


def _joined(path: str, parts: Sequence[LayerParameters]) -> LayerParameters:
    touched = torch.stack([touched_pairs(layer) for layer in parts])
    disputed = (touched.sum(dim=0) > 1).nonzero().flatten().tolist()
    if disputed:
        numbers = [number for number, row in enumerate(touched.tolist(), start=1) if row[disputed[0]]]
        raise AdapterError(
            f"layer {path}: got {len(disputed)} pairs that several adapters change (pair {disputed[0]}: adapters "
            f"{', '.join(map(str, numbers))}); wanted disjoint ones; restrict the adapters, or use compose_adapters, in which "
            "one follows the other"
        )
    pairs, first = _pairs(parts[0]), parts[0]
    theta, alpha = torch.zeros_like(first.theta), torch.ones_like(first.alpha)
    for layer, own in zip(parts, touched, strict=True):
        theta = torch.where(own[pairs], layer.theta, theta)
        alpha = torch.where(own[pairs], layer.alpha, alpha)
    return LayerParameters(theta, alpha, first.variant, first.group_size)


def _check_alike(first: Adapter, other: Adapter, number: int) -> None:
    missing = sorted(first.layers.keys() ^ other.layers.keys())
    if missing:
        raise ConfigError(
            f"layer {missing[0]}: got it in one of the adapters 1 and {number} only; wanted adapters of the same layers; "
            "use compose_adapters, to which a missing layer is the identity"
        )
    for path, layer in first.layers.items():
        shapes = [_shape(layer), _shape(other.layers[path])]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"layer {path}: got {shapes[0]} in adapter 1 and {shapes[1]} in adapter {number}; wanted one variant, "
                "group_size, number of outputs and device; use compose_adapters, which takes several variants"
            )


def _shape(layer: LayerParameters) -> str:
    kind = f"{layer.variant.value}, group_size={layer.group_size}, {layer.out_features} outputs"
    return f"{kind} on {layer.theta.device}"


def _no_others(*adapters: Adapter) -> dict[str, Tensor]:
    for adapter in adapters:
        if adapter.other:
            raise AdapterError(
                f"got {len(adapter.other)} tensors that are no rotations ({next(iter(adapter.other))}); wanted none, because "
                "weights of modules_to_save and trained biases have no pairs; make an Adapter of its layers alone"
            )
    return {}


def _config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all adapters say alike; of the settings that say which layers they have, the first one's: it has the same."""
    first, *others = (adapter.config for adapter in adapters)
    return {
        key: value
        for key, value in first.items()
        if key in _OF_LAYERS or all(key in other and other[key] == value for other in others)
    }


_OF_LAYERS = frozenset(
    {"variant", "variant_pattern", "group_size", "group_size_pattern", "adapt_group_size", "target_modules"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern"}
)
