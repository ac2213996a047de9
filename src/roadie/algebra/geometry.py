"""Between rotations: the curve from one to another, the mean of many, what one does that another does not, and how far apart.

    interpolate(A, B, t)    A (A^-1 B)^t, the curve of one constant turn and stretch; for road_1 the geodesic, the short way
    mean                    exp(sum of w_k log R_k), weights that add up to 1; with the magnitude correction of OrthoMerge
                            (arXiv 2602.05943) as far from the identity as the R_k are in the mean of their distances
    subtract(B, A)          B A^-1: what is to be applied after A so that both do what B does
    distance, chordal       |A - B|: for outputs h whose elements are independent and of one size, the root mean square of
                            (A - B) h over that of h
    distance, geodesic      |log(A^-1 B)|: for road_1 the length of the shortest curve, in radians and in nepers of scale

Both distances are root mean squares over the outputs, so that two layers that differ by a small turn of x radians everywhere
are x apart in both. All arithmetic is in float64. A rotation that does not turn (cross = 0) has no pairs, so that it fits
every group size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum

import torch

from roadie.algebra.powers import CANCELLATION, blend, logarithm, power, wide
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, inverse


class Metric(str, Enum):
    """How the distance of two rotations is measured; see the module."""

    CHORDAL = "chordal"
    GEODESIC = "geodesic"

    @classmethod
    def parse(cls, value: str | Metric) -> Metric:
        """The metric named `value`; raises `ConfigError` for any other name."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(f"got metric {value!r}; wanted 'chordal' or 'geodesic'") from None


def interpolate(start: Rotation, end: Rotation, t: float) -> Rotation:
    """``A (A^-1 B)^t``, in float64: `start` at t = 0, `end` at 1, both as they are; t outside of [0, 1] goes on beyond them.

    Raises `AdapterError` where `start` has no inverse or ``A^-1 B`` no real logarithm (neither is needed at 0 and 1), and as
    `in_one_pairing` does.
    """
    parts = in_one_pairing({"start": start, "end": end})
    start, end = (wide(rotation) for rotation in parts.values())
    if t in (0, 1):
        return end if t else start
    return compose(start, power(compose(inverse(start), end), t))


def mean(
    rotations: Sequence[Rotation], weights: Sequence[float] | None = None, *, magnitude_corrected: bool = False
) -> Rotation:
    """``exp(sum of w_k log R_k)``, in float64, with weights that are made to add up to 1; see `corrected_weights`.

    weights: as many finite numbers, none negative, not all 0; None: equal ones.
    Raises `AdapterError` where they are not, and as `blend` and `in_one_pairing` do.
    """
    part_of = shares(len(rotations), weights)
    aligned = list(in_one_pairing({f"{index}": rotation for index, rotation in enumerate(rotations)}).values())
    return blend(aligned, corrected_weights(aligned, part_of) if magnitude_corrected else part_of)


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """`weights` (None: equal ones) over their sum; raises `AdapterError` unless they are weights of a mean of `count`."""
    weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if not count or len(weights) != count:
        raise AdapterError(
            f"got {count} adapters or rotations and {len(weights)} weights; wanted as many, at least one"
        )
    total = math.fsum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise AdapterError(f"got weights {weights}; wanted finite numbers for a mean, none negative and not all 0")
    return [weight / total for weight in weights]


def corrected_weights(rotations: Sequence[Rotation], weights: Sequence[float]) -> list[float]:
    """`weights` times ``sum of w_k |log R_k| / |sum of w_k log R_k|``, Frobenius norms over all pairs (OrthoMerge).

    Where the logarithms point in different ways their mean is shorter than they are; this makes it as long again. Where
    they cancel, but for rounding, there is no direction to lengthen, and the weights stay as they are.
    """
    active = [(rotation, weight) for rotation, weight in zip(rotations, weights, strict=True) if weight != 0]
    if len(active) < 2:
        return list(weights)
    generators = [(logarithm(rotation), weight) for rotation, weight in active]
    direct = torch.stack([weight * generator.direct for generator, weight in generators]).sum(0)
    cross = torch.stack([weight * generator.cross for generator, weight in generators]).sum(0)
    apart = math.fsum(weight * _norm(generator.direct, generator.cross) for generator, weight in generators)
    together = _norm(direct, cross)
    if together <= len(active) * CANCELLATION * apart:
        return list(weights)
    return [weight * apart / together for weight in weights]


def subtract(rotation: Rotation, removed: Rotation) -> Rotation:
    """``B A^-1``, in float64: what `rotation` does that `removed` does not; applied after `removed` it gives `rotation`.

    Raises `AdapterError` where `removed` has a singular block, and as `in_one_pairing` does.
    """
    parts = in_one_pairing({"rotation": rotation, "removed": removed})
    rotation, removed = (wide(part) for part in parts.values())
    return compose(rotation, inverse(removed))


def squared_distance(first: Rotation, second: Rotation, metric: Metric) -> float:
    """The square of the distance times the number of outputs, so that layers can be added up.

    Raises `AdapterError` where the metric is geodesic and `first` has no inverse or ``A^-1 B`` no real logarithm, and as
    `in_one_pairing` does.
    """
    first, second = (wide(part) for part in in_one_pairing({"first": first, "second": second}).values())
    if metric is Metric.CHORDAL:
        return _norm(first.direct - second.direct, first.cross - second.cross) ** 2
    between = logarithm(compose(inverse(first), second))
    return _norm(between.direct, between.cross) ** 2


def in_one_pairing(rotations: Mapping[str, Rotation]) -> dict[str, Rotation]:
    """The same rotations, all with one group size: that of those which turn.

    A rotation that does not turn (cross = 0) is the same in every group size. Raises `ConfigError` where rotations turn in
    different group sizes, `AdapterError` where they have different numbers of outputs; both name the rotations.
    """
    widths = {name: rotation.out_features for name, rotation in rotations.items()}
    if len(set(widths.values())) > 1:
        raise AdapterError(f"got out_features {widths}; wanted one; use adapters of one base model")
    sizes = {name: rotation.group_size for name, rotation in rotations.items()}
    if len(set(sizes.values())) == 1:
        return dict(rotations)
    turning = {sizes[name] for name, rotation in rotations.items() if bool(rotation.cross.any())}
    if len(turning) > 1:
        raise ConfigError(
            f"got group_size {sizes}; wanted one; two sizes share no pair of outputs, so that products and blends of them are no "
            "rotations of pairs; train the adapters with one, or apply them one after the other"
        )
    size = next(iter(turning or sizes.values()))
    return {name: Rotation(rotation.direct, rotation.cross, size) for name, rotation in rotations.items()}


def _norm(direct: torch.Tensor, cross: torch.Tensor) -> float:
    """The Frobenius norm of all blocks: every element of R stands once, in direct or in cross."""
    return float(torch.linalg.vector_norm(torch.stack((direct, cross))))
