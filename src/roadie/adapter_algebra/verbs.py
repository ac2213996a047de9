"""The verbs of the algebra, on rotations and on whole adapters alike: `roadie.compose`, `roadie.power`, and so on.

Two rotations give a rotation, in float64 but for `compose` and `inverse`, which keep the dtype; two adapters give an adapter,
which is saved, loaded by stock PEFT, served and trained like any other. A layer that an adapter does not have is the identity
there. All raise `AdapterError` or `ConfigError` where something does not fit; for adapters the error names the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar, overload

from roadie import algebra, embedded, rotation
from roadie.adapter import Adapter
from roadie.adapter_algebra import operations
from roadie.adapter_algebra.layers import Chains, Rotations, combined, over_layers
from roadie.algebra import Metric, compose_chains, in_one_pairing, interpolate_chains, inverse_chain
from roadie.algebra.powers import identity_like
from roadie.errors import AdapterError
from roadie.rotation import Rotation

T = TypeVar("T", Rotation, Adapter)

_ONE, _REMOVED = "the adapter", "the removed one"


def compose(outer: T, inner: T) -> T:
    """What does `inner`, then `outer`: the product of their blocks, at O(D) a layer.

    Raises `ConfigError` where both turn in different group sizes, which is no rotation of pairs; `AdapterError` for adapters
    of different base models or with other tensors.
    """
    if isinstance(outer, Rotation) and isinstance(inner, Rotation):
        return rotation.compose(**in_one_pairing({"outer": outer, "inner": inner}))
    return operations.compose_adapters(*_adapters("compose", outer, inner))


def inverse(of: T) -> T:
    """What undoes it, in closed form; raises `AdapterError` where a block is singular."""
    if isinstance(of, Rotation):
        return rotation.inverse(of)
    return operations.blend_adapters(_adapters("inverse", of), [-1.0], names=[_ONE])


def power(of: T, exponent: float) -> T:
    """It at the strength `exponent`: 0.5 is half of it, 2 it twice, -1 its inverse, 0 the identity.

    Integers multiply blocks; other exponents go by the principal logarithm, ``exp(s log R)``. Raises `AdapterError` where a
    block has none, or no inverse where the exponent is a negative integer.
    """
    if isinstance(of, Rotation):
        return algebra.power(of, exponent)
    return operations.blend_adapters(_adapters("power", of), [exponent], names=[_ONE])


def interpolate(start: T, end: T, t: float) -> T:
    """``A (A^-1 B)^t``: `start` at t = 0, `end` at t = 1; for road_1 the geodesic between them, the short way round.

    Raises `AdapterError` where `start` has no inverse, or the way from one to the other no real logarithm.
    """
    if isinstance(start, Rotation) and isinstance(end, Rotation):
        return algebra.interpolate(start, end, t)

    def between(parts: Chains) -> Sequence[Rotation]:
        return interpolate_chains(_or_identities(parts, "start"), _or_identities(parts, "end"), t)

    return combined(_named("interpolate", start=start, end=end), between)


@overload
def mean(
    of: Sequence[Rotation], weights: Sequence[float] | None = None, *, magnitude_corrected: bool = False
) -> Rotation: ...


@overload
def mean(
    of: Sequence[Adapter], weights: Sequence[float] | None = None, *, magnitude_corrected: bool = False
) -> Adapter: ...


def mean(
    of: Sequence[Rotation] | Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    magnitude_corrected: bool = False,
) -> Rotation | Adapter:
    """``exp(sum of w_k log R_k)`` with weights that are made to add up to 1 (None: equal ones); one or more of one kind.

    magnitude_corrected: lengthen the mean of the logarithms to the mean of their lengths, a layer at a time, as OrthoMerge
    does (arXiv 2602.05943). Raises `AdapterError` where a block has no real logarithm, or a weight is negative.
    """
    rotations = [part for part in of if isinstance(part, Rotation)]
    if rotations and len(rotations) == len(of):
        return algebra.mean(rotations, weights, magnitude_corrected=magnitude_corrected)
    adapters = _adapters("mean", *of)
    return operations.mean_adapters(adapters, weights, magnitude_corrected=magnitude_corrected)


def subtract(of: T, removed: T) -> T:
    """``B A^-1``: what `of` does that `removed` does not; ``compose(subtract(b, a), a)`` is b.

    Raises `AdapterError` where `removed` has a singular block.
    """
    if isinstance(of, Rotation) and isinstance(removed, Rotation):
        return algebra.subtract(of, removed)

    def difference(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(parts.get(_ONE, ()), inverse_chain(parts.get(_REMOVED, ())))

    def difference_of_inputs(parts: Chains) -> Sequence[Rotation]:
        return compose_chains(inverse_chain(parts.get(_REMOVED, ())), parts.get(_ONE, ()))

    return combined(_named("subtract", **{_ONE: of, _REMOVED: removed}), difference, at_inputs=difference_of_inputs)


def distance(first: T, second: T, metric: str | Metric = Metric.CHORDAL) -> float:
    """How far apart they are, a root mean square over the outputs that either changes; 0 for equal ones.

    "chordal": the relative root mean square difference of their outputs, for outputs of the base layer whose elements are
    independent and of one size. "geodesic": the length of the way from one to the other, in radians and in nepers of scale;
    it raises `AdapterError` where that way has no real logarithm. For small turns both are the angle between them.
    """
    metric = Metric.parse(metric)
    if isinstance(first, Rotation) and isinstance(second, Rotation):
        return math.sqrt(
            algebra.squared_distance(first, second, metric) / max(first.direct.numel(), second.direct.numel())
        )

    def square(parts: Rotations) -> tuple[float, int]:
        one, two = (parts.get(name) or identity_like(next(iter(parts.values()))) for name in ("first", "second"))
        return algebra.squared_distance(one, two, metric), one.out_features

    squares = over_layers(_named("distance", first=first, second=second), square).values()
    return math.sqrt(math.fsum(square for square, _ in squares) / sum(width for _, width in squares))


def check_one_base(adapters: Iterable[Adapter]) -> None:
    """Raise `AdapterError` where adapters name different base models; the embedded model is one, wherever it lies."""
    names = sorted({embedded.name_here(adapter.base_model_name) for adapter in adapters if adapter.base_model_name})
    if len(names) > 1:
        raise AdapterError(
            f"got adapters of different base models ({', '.join(names)}); wanted one, because a rotation of one model's outputs "
            "means nothing in another; where they are one model under two names, change base_model_name_or_path in the config"
        )


def _or_identities(parts: Chains, name: str) -> Sequence[Rotation]:
    """The adapter's chain at the layer at hand; where it does not adapt it, identities in the group sizes of the other's."""
    return parts.get(name) or [identity_like(rotation) for rotation in next(iter(parts.values()))]


def _named(verb: str, **parts: object) -> dict[str, Adapter]:
    """The parts by the names that errors call them."""
    return dict(zip(parts, _adapters(verb, *parts.values()), strict=True))


def _adapters(verb: str, *parts: object) -> list[Adapter]:
    """The parts, which must be adapters of one base model."""
    adapters = [part for part in parts if isinstance(part, Adapter)]
    if len(adapters) != len(parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise AdapterError(
            f"got {kinds} to {verb}; wanted Rotation or Adapter values, all of one kind; load files with "
            "roadie.checkpoint.load"
        )
    check_one_base(adapters)
    return adapters
