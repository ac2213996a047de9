"""The operations on whole adapters: each layer by `roadie.rotation` and `roadie.algebra`.

Weight and exponent 1 of a single adapter give that adapter itself. Adapters with other tensors (modules_to_save, trained
biases) are refused, because only rotations have an algebra. All raise `AdapterError` or `ConfigError`, naming the layer and
where it matters the adapter and the outputs, where adapters do not fit together, values are not finite, a block has no inverse
or no logarithm and would need one, or a result is too large for its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from roadie.adapter import Adapter
from roadie.adapter_algebra.layers import Chains, Rotations, combined, over_layers
from roadie.algebra import (
    Metric,
    blend_chains,
    compose_chains,
    interpolate_chains,
    inverse_chain,
    mean_chains,
    shares,
    squared_distance,
)
from roadie.algebra.powers import identity_like
from roadie.errors import AdapterError
from roadie.rotation import Rotation


def compose_adapters(outer: Adapter, inner: Adapter) -> Adapter:
    """The adapter that does what `inner` does, then `outer`, in every layer; their rotations of inputs the other way round."""

    def product(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get("outer", ()), parts.get("inner", ()))

    def product_of_inputs(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get("inner", ()), parts.get("outer", ()))

    return combined({"outer": outer, "inner": inner}, product, at_inputs=product_of_inputs)


def inverse_adapter(adapter: Adapter) -> Adapter:
    """The adapter that undoes `adapter`; raises `AdapterError`, naming layer and outputs, where a block is singular."""
    return power_adapter(adapter, -1.0)


def power_adapter(adapter: Adapter, exponent: float) -> Adapter:
    """`adapter` at the strength `exponent`: 0.5 for half of it, -1 for its inverse; see `roadie.algebra.power`."""
    return blend_adapters([adapter], [exponent], names=["the adapter"])


def blend_adapters(adapters: Sequence[Adapter], weights: Sequence[float], *, names: Sequence[str] = ()) -> Adapter:
    """The mixture of `adapters` with `weights`, in every layer; see `roadie.algebra.blend`.

    adapters: one or more; weights: as many finite numbers; names: as many, what errors call the adapters. Adapters of weight
    0 are ignored; where nothing is left, the result is the identity.
    """
    names = _names(adapters, names)
    if not len(adapters) == len(weights) == len(set(names)) or not adapters:
        raise AdapterError(
            f"got {len(adapters)} adapters, {len(weights)} weights and the names {list(names)}; wanted as many of each, at "
            "least one, and different names"
        )
    weight_of = dict(zip(names, map(float, weights), strict=True))
    active = {name: adapter for name, adapter in zip(names, adapters, strict=True) if weight_of[name] != 0}
    if [weight_of[name] for name in active] == [1.0]:
        return next(iter(active.values()))

    def mixture(parts: Chains) -> Sequence[Rotation]:
        return blend_chains(list(parts.values()), [weight_of[name] for name in parts], names=list(parts))

    return combined(active or dict(zip(names, adapters, strict=True)), mixture)


def interpolate_adapters(start: Adapter, end: Adapter, t: float) -> Adapter:
    """`start` at t = 0, `end` at 1, and between them the curve of one constant turn; see `roadie.algebra.interpolate`."""

    def between(parts: Chains) -> Sequence[Rotation]:
        return interpolate_chains(_or_identities(parts, "start"), _or_identities(parts, "end"), t)

    return combined({"start": start, "end": end}, between)


def mean_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    magnitude_corrected: bool = False,
    names: Sequence[str] = (),
) -> Adapter:
    """The mean of `adapters`, in every layer; see `roadie.algebra.mean`. The magnitude is corrected a layer at a time."""
    names = _names(adapters, names)
    part_of = dict(zip(names, shares(len(adapters), weights), strict=True))

    def average(parts: Chains) -> Sequence[Rotation]:
        chains, weights = list(parts.values()), [part_of[name] for name in parts]
        return mean_chains(chains, weights, magnitude_corrected=magnitude_corrected, names=list(parts))

    return combined(dict(zip(names, adapters, strict=True)), average)


def subtract_adapters(adapter: Adapter, removed: Adapter) -> Adapter:
    """What `adapter` does that `removed` does not: applied after `removed`, it gives `adapter`."""

    def difference(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get("the adapter", ()), inverse_chain(parts.get("the removed one", ())))

    def difference_of_inputs(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(inverse_chain(parts.get("the removed one", ())), parts.get("the adapter", ()))

    named = {"the adapter": adapter, "the removed one": removed}
    return combined(named, difference, at_inputs=difference_of_inputs)


def distance_adapters(first: Adapter, second: Adapter, metric: Metric = Metric.CHORDAL) -> float:
    """The distance of two adapters over all outputs and inputs of layers that either rotates; see `roadie.algebra.geometry`."""
    squares = _squares(first, second, metric)
    return math.sqrt(math.fsum(square for square, _ in squares.values()) / sum(width for _, width in squares.values()))


def layer_distances(first: Adapter, second: Adapter, metric: Metric = Metric.CHORDAL) -> dict[str, float]:
    """Module path -> the distance of two adapters in that layer."""
    return {path: math.sqrt(square / width) for path, (square, width) in _squares(first, second, metric).items()}


def _squares(first: Adapter, second: Adapter, metric: Metric) -> dict[str, tuple[float, int]]:
    def square(parts: Rotations) -> tuple[float, int]:
        one, two = (_or_identity(parts, name) for name in ("first", "second"))
        return squared_distance(one, two, metric), one.out_features

    return over_layers({"first": first, "second": second}, square)


def _or_identity(parts: Rotations, name: str) -> Rotation:
    """The adapter's rotation of the layer at hand, the identity where it does not adapt it."""
    return parts.get(name) or identity_like(next(iter(parts.values())))


def _or_identities(parts: Chains, name: str) -> Sequence[Rotation]:
    """As `_or_identity`, with the group sizes of the other's rotations."""
    return parts.get(name) or [identity_like(rotation) for rotation in next(iter(parts.values()))]


def _names(adapters: Sequence[Adapter], names: Sequence[str]) -> Sequence[str]:
    return names or [f"adapter {index} of {len(adapters)}" for index in range(len(adapters))]
