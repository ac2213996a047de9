"""The laws of interpolation, means, differences and distances, as functions that raise AssertionError where one is broken.

Truth are dense float64 matrices: products and inverses of the blocks cut out of the dense R; a point of a curve by the powers
it must have. Bounds are derived as in `algebra_laws`, pair by pair in Frobenius norms. An inverse divides by a determinant, whose
relative error is u times the condition, so that ``A^-1 B`` is off by ``u |A| |A^-1|^2 |B|``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tests.laws.algebra import (
    ROUNDINGS,
    U,
    assert_close,
    assert_same_rotation,
    blocks,
    error_of_blend,
    error_of_power,
    norm,
)
from tests.laws.reference import dense
from torch import Tensor

from roadie.algebra import Metric, interpolate, logarithm, mean, squared_distance, subtract
from roadie.rotation import Rotation, compose, inverse


def check_interpolation(start: Rotation, end: Rotation, numerator: int, denominator: int) -> None:
    """At t = p / q in (0, 1) the way from A has gone p / q of what is between: ``(A^-1 M)^q = (A^-1 B)^p``, the short way.

    Which of the q roots it is, is said by the angles of ``A^-1 M``: none larger than t times half a turn.
    """
    t = numerator / denominator
    middle = interpolate(start, end, t)
    first, between = blocks(start), torch.linalg.solve(blocks(start), blocks(end))
    gone = torch.linalg.solve(first, blocks(middle))
    condition = norm(first) * norm(torch.linalg.inv(first))
    moved = norm(torch.linalg.inv(first)) * _error_of_interpolation(start, end, t)
    moved = moved + ROUNDINGS * U * condition * norm(gone)
    bound = denominator * norm(gone) ** (denominator - 1) * moved
    bound = bound + numerator * norm(between) ** (numerator - 1) * _error_of_quotient(start, end)
    bound = bound + ROUNDINGS * (denominator + numerator) * U * norm(gone) ** denominator
    reached = torch.linalg.matrix_power(gone, denominator)
    assert_close(reached, torch.linalg.matrix_power(between, numerator), bound, "(A^-1 M)^q")
    angles = torch.linalg.eigvals(gone).angle().abs().amax(-1)
    # Eigenvalues of a block that is nearly a shear are off by the root of its rounding.
    assert bool((angles <= math.pi * t + 1e-6).all()), f"got an angle of {float(angles.max())}"


def check_ends_of_interpolation(start: Rotation, end: Rotation) -> None:
    """At 0 it is the start and at 1 the end, bit for bit, whether they have inverses or not."""
    assert_same_rotation(interpolate(start, end, 0), start, "t = 0")
    assert_same_rotation(interpolate(start, end, 1), end, "t = 1")


def check_the_way_back(start: Rotation, end: Rotation, t: float) -> None:
    """From A to B at t is from B to A at 1 - t; 1 - t must be exact, and nothing near a half turn."""
    there, back = interpolate(start, end, t), interpolate(end, start, 1 - t)
    bound = _error_of_interpolation(start, end, t) + _error_of_interpolation(end, start, 1 - t)
    assert_close(blocks(there), blocks(back), bound, "the way back")


def check_moved_along(start: Rotation, end: Rotation, by: Rotation, t: float) -> None:
    """Whatever is applied after both ends, or before, is applied to what lies between: ``C M`` and ``M C``."""
    middle = interpolate(start, end, t)
    for ends, wanted in (
        ((compose(by, start), compose(by, end)), blocks(by) @ blocks(middle)),
        ((compose(start, by), compose(end, by)), blocks(middle) @ blocks(by)),
    ):
        growth = norm(blocks(by)) * norm(torch.linalg.inv(blocks(by)))
        bound = growth * (_error_of_interpolation(*ends, t) + norm(blocks(by)) * _error_of_interpolation(start, end, t))
        assert_close(blocks(interpolate(*ends, t)), wanted, bound, "moved along")


def check_geodesic(theta: Tensor, alpha: Tensor, t: float) -> None:
    """road_1 in groups of 2, theta and alpha > 0 of both ends ``[2, P]``: angles the short way, scales geometrically."""
    turn = torch.remainder(theta[1] - theta[0] + math.pi, 2 * math.pi) - math.pi
    angle, scale = theta[0] + t * turn, alpha[0] ** (1 - t) * alpha[1] ** t
    wanted = _road_1(angle, scale)
    got = interpolate(_road_1(theta[0], alpha[0]), _road_1(theta[1], alpha[1]), t)
    reach = 2 + theta.abs().sum(0) + alpha.log().abs().sum(0) + 1 / (math.pi - turn.abs()).clamp(min=1e-9)
    assert_close(blocks(got), blocks(wanted), 4 * ROUNDINGS * U * scale * reach, "the geodesic")


def check_mean(rotations: Sequence[Rotation], weights: Sequence[float]) -> None:
    """``exp(sum of w log R)`` by dense matrix exponentials, with weights over their sum."""
    shares = [weight / math.fsum(weights) for weight in weights]
    total = _weighted(rotations, shares).sum(0)
    bound = error_of_blend(rotations, shares) + ROUNDINGS * U * norm(torch.linalg.matrix_exp(total))
    assert_close(blocks(mean(rotations, weights)), torch.linalg.matrix_exp(total), bound, "the mean")


def check_corrected_mean(rotations: Sequence[Rotation], weights: Sequence[float]) -> None:
    """The same with the sum of the logarithms stretched, over all pairs at once, to the mean of their lengths."""
    shares = [weight / math.fsum(weights) for weight in weights]
    parts = _weighted(rotations, shares)
    stretch = float(sum(torch.linalg.vector_norm(part) for part in parts) / torch.linalg.vector_norm(parts.sum(0)))
    wanted = torch.linalg.matrix_exp(stretch * parts.sum(0))
    bound = error_of_blend(rotations, [stretch * share for share in shares])
    room = ROUNDINGS * len(parts[0]) * U * stretch * (1 + stretch * norm(parts.sum(0))) * norm(wanted)
    got = mean(rotations, weights, magnitude_corrected=True)
    assert_close(blocks(got), wanted, bound + room, "the corrected mean")


def check_subtraction(rotation: Rotation, removed: Rotation) -> None:
    """``B A^-1`` by dense matrices; applied after A it gives B."""
    left = subtract(rotation, removed)
    wanted = torch.linalg.solve(blocks(removed).mT, blocks(rotation).mT).mT
    bound = _error_of_quotient(removed, rotation)
    assert_close(blocks(left), wanted, bound, "B A^-1")
    again = norm(blocks(removed)) * bound + ROUNDINGS * U * norm(blocks(left)) * norm(blocks(removed))
    assert_close(blocks(compose(left, removed)), blocks(rotation), again, "B A^-1 A")


def check_chordal_distance(first: Rotation, second: Rotation, third: Rotation) -> None:
    """The Frobenius norm of the dense ``A - B``; a distance: symmetric, 0 to itself, and no detour is shorter."""
    difference = torch.linalg.matrix_norm(dense(first) - dense(second)).item()
    room = 1 + (first.out_features + ROUNDINGS) * U
    there, back = (_root(one, two, Metric.CHORDAL) for one, two in ((first, second), (second, first)))
    assert difference / room <= there <= difference * room, f"got {there}; wanted {difference}"
    assert there == back
    assert _root(first, first, Metric.CHORDAL) == 0
    detour = _root(first, third, Metric.CHORDAL) + _root(third, second, Metric.CHORDAL)
    assert there <= detour * room


def check_geodesic_distance(first: Rotation, second: Rotation, moved: Rotation) -> None:
    """The length of the logarithm of the dense ``A^-1 B``; the same after anything else, and from the other end."""
    between = compose(inverse(first), second)
    truth = torch.linalg.vector_norm(blocks(logarithm(between))).item()
    # A tenth of a turn and more away from half a turn, conditions of a few units: log magnifies rounding by less than 1000.
    bound = 1000 * ROUNDINGS * first.out_features * U
    for one, two in ((first, second), (second, first), (compose(moved, first), compose(moved, second))):
        got = _root(one, two, Metric.GEODESIC)
        assert abs(got - truth) <= bound, f"got {got}; wanted {truth}"


def _root(first: Rotation, second: Rotation, metric: Metric) -> float:
    return math.sqrt(squared_distance(first, second, metric))


def _weighted(rotations: Sequence[Rotation], shares: Sequence[float]) -> Tensor:
    """The logarithms times their weights, ``[K, P, 2, 2]``."""
    return torch.stack([share * blocks(logarithm(part)) for part, share in zip(rotations, shares, strict=True)])


def _error_of_quotient(divisor: Rotation, rotation: Rotation) -> Tensor:
    back = norm(torch.linalg.inv(blocks(divisor)))
    return 2 * ROUNDINGS * U * norm(blocks(divisor)) * back**2 * norm(blocks(rotation))


def _error_of_interpolation(start: Rotation, end: Rotation, t: float) -> Tensor:
    """``|A|`` times what the error of ``A^-1 B`` makes of its power, and the rounding of the product."""
    between = compose(inverse(start), end)
    magnified = 1 + _error_of_quotient(start, end) / (ROUNDINGS * U * norm(blocks(between)))
    size = norm(torch.linalg.matrix_exp(t * blocks(logarithm(between))))
    return norm(blocks(start)) * (magnified * error_of_power(between, t) + ROUNDINGS * U * size)


def _road_1(theta: Tensor, alpha: Tensor) -> Rotation:
    """``[P]`` angles and scales as a rotation in groups of 2: direct and cross, each twice."""
    direct, cross = ((alpha * part).repeat_interleave(2) for part in (torch.cos(theta), torch.sin(theta)))
    return Rotation(direct, cross, 2)
