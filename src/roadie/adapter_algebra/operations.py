"""Products, blends and means of whole adapters, each layer by `roadie.algebra`; whether they are of one model is not asked.

A weight of 1 of a single adapter gives that adapter itself. Adapters with other tensors (modules_to_save, trained
biases) are refused, because only rotations have an algebra. All raise `AdapterError` or `ConfigError`, naming the layer and
where it matters the adapter and the outputs, where adapters do not fit together, values are not finite, a block has no inverse
or no logarithm and would need one, or a result is too large for its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

from roadie.adapter import Adapter
from roadie.adapter_algebra.layers import Chains, combined
from roadie.algebra import blend_chains, compose_chains, mean_chains, shares
from roadie.errors import AdapterError
from roadie.rotation import Rotation


def compose_adapters(outer: Adapter, inner: Adapter) -> Adapter:
    """The adapter that does what `inner` does, then `outer`, in every layer; their rotations of inputs the other way round."""

    def product(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get("outer", ()), parts.get("inner", ()))

    def product_of_inputs(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get("inner", ()), parts.get("outer", ()))

    return combined({"outer": outer, "inner": inner}, product, at_inputs=product_of_inputs)


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


def _names(adapters: Sequence[Adapter], names: Sequence[str]) -> Sequence[str]:
    return names or [f"adapter {index} of {len(adapters)}" for index in range(len(adapters))]
