"""The laws of powers and blends, as functions that raise AssertionError where one is broken.

Bounds are derived, never tuned, pair by pair, in Frobenius norms. With u the unit roundoff of float64 and K the norm of the
derivative of exp at ``log R``, a logarithm is off by what rounding R could do to it, ``u |K^-1| |R|``, and its own rounding,
``u |log R|``; an exponential passes the error of its argument on, times K, and adds its own. No number goes through more than
`ROUNDINGS` operations on its way. The derivatives come from dense 4 x 4 matrix exponentials, which know nothing of rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tests.laws.reference import dense, pairs
from torch import Tensor

from roadie.algebra import blend, logarithm, power
from roadie.rotation import Rotation, compose, inverse
from roadie.testing.accuracy import assert_same_bits, unit_roundoff

ROUNDINGS = 16
U = unit_roundoff(torch.float64)


def blocks(rotation: Rotation) -> Tensor:
    """The blocks of one adapter, cut out of the dense R: ``[P, 2, 2]`` in float64."""
    matrix = dense(rotation)
    i, k = (torch.tensor(members) for members in zip(*pairs(len(matrix), rotation.group_size), strict=True))
    return torch.stack(
        (torch.stack((matrix[i, i], matrix[i, k]), -1), torch.stack((matrix[k, i], matrix[k, k]), -1)), -2
    )


def check_logarithm(rotation: Rotation) -> None:
    """``exp(log R) = R``, and the angles of log R lie in (-pi, pi]: together they say which logarithm it is."""
    generator = blocks(logarithm(rotation))
    bound = _error_of_exponential(generator, _error_of_logarithm(rotation, generator))
    assert_close(torch.linalg.matrix_exp(generator), blocks(rotation), bound, "exp(log R)")
    angles = torch.linalg.eigvals(generator).imag
    assert bool((angles.abs() <= math.pi * (1 + ROUNDINGS * U)).all()), f"got an angle of {float(angles.abs().max())}"


def check_power(rotation: Rotation, exponent: float) -> None:
    """``R^s = exp(s log R)``, by the dense matrix exponential, for blocks with a logarithm."""
    generator = exponent * blocks(logarithm(rotation))
    wanted = torch.linalg.matrix_exp(generator)
    assert_close(blocks(power(rotation, exponent)), wanted, error_of_power(rotation, exponent), f"R^{exponent}")


def check_integer_power(rotation: Rotation, exponent: int) -> None:
    """``R^n`` is R multiplied n times, inverted where n < 0, for every block that is not singular."""
    factor = rotation if exponent >= 0 else inverse(rotation)
    wanted = torch.linalg.matrix_power(blocks(factor), abs(exponent))
    bound = 2 * ROUNDINGS * abs(exponent) * U * norm(blocks(factor)) ** abs(exponent)
    assert_close(blocks(power(rotation, exponent)), wanted, bound, f"R^{exponent}")


def check_exponents_add(rotation: Rotation, first: float, second: float) -> None:
    """``R^(s + t) = R^s R^t``; s + t must be exact."""
    powers = power(rotation, first), power(rotation, second)
    errors = [error_of_power(rotation, exponent) for exponent in (first, second)]
    sizes = [norm(blocks(factor)) for factor in powers]
    bound = errors[0] * sizes[1] + errors[1] * sizes[0] + ROUNDINGS * U * sizes[0] * sizes[1]
    bound = bound + error_of_power(rotation, first + second)
    assert_close(blocks(compose(*powers)), blocks(power(rotation, first + second)), bound, "R^s R^t")


def check_one_and_minus_one(rotation: Rotation) -> None:
    """``R^1`` is R and ``R^-1`` its inverse, bit for bit."""
    assert_same_rotation(power(rotation, 1.0), rotation, "R^1")
    assert_same_rotation(power(rotation, -1.0), inverse(rotation), "R^-1")


def check_a_blend_of_one_is_a_power(rotation: Rotation, weight: float) -> None:
    """``{R: w}`` is ``R^w``, bit for bit, whatever else has weight 0."""
    singular = Rotation(torch.zeros_like(rotation.direct), torch.zeros_like(rotation.cross), rotation.group_size)
    assert_same_rotation(blend([rotation], [weight]), power(rotation, weight), "a blend of one")
    assert_same_rotation(blend([singular, rotation], [0.0, weight]), power(rotation, weight), "a blend beside weight 0")


def check_blend(rotations: Sequence[Rotation], weights: Sequence[float]) -> None:
    """A blend is ``exp(sum of w log R)``, by the dense matrix exponential, in whatever order the rotations are given."""
    generators = [weight * blocks(logarithm(rotation)) for rotation, weight in zip(rotations, weights, strict=True)]
    bound = error_of_blend(rotations, weights)
    wanted = torch.linalg.matrix_exp(torch.stack(generators).sum(0))
    assert_close(blocks(blend(rotations, weights)), wanted, bound, "a blend")
    backwards = blend(rotations[::-1], weights[::-1])
    assert_close(blocks(backwards), blocks(blend(rotations, weights)), 2 * bound, "the same in another order")


def check_commuting_weights_add(rotation: Rotation, first: float, second: float) -> None:
    """``{R: s, R: t}`` is ``R^(s + t)``, and so is ``{R: s, R^(1/2): 2t}``."""
    wanted = blocks(power(rotation, first + second))
    error = error_of_power(rotation, first + second)
    half = power(rotation, 0.5)
    for other, weight in ((rotation, second), (half, 2 * second)):
        bound = error_of_blend([rotation, other], [first, weight])
        if other is half:  # itself rounded
            generator = blocks(logarithm(half))
            moved = _size_of_inverse(_derivative_of_exp(generator)) * error_of_power(rotation, 0.5)
            total = first * blocks(logarithm(rotation)) + weight * generator
            bound = bound + _size(_derivative_of_exp(total)) * abs(weight) * moved
        assert_close(blocks(blend([rotation, other], [first, weight])), wanted, bound + error, "weights that add")


def check_closed_form(thetas: Tensor, alphas: Tensor, weights: Sequence[float], group_size: int) -> None:
    """road_1 blends: alphas to the weights, thetas times the weights; thetas (in (-pi, pi]), alphas > 0: ``[K, P]``.

    The pairs of a group of G are its G/2 parameters, in order; a power by multiplication agrees with it too.
    """
    rotations = [_road_1(theta, alpha, group_size) for theta, alpha in zip(thetas, alphas, strict=True)]
    weight_K = torch.tensor(weights, dtype=torch.float64)
    theta, alpha = weight_K @ thetas, alphas.log().mul(weight_K[:, None]).sum(0).exp()
    wanted = _road_1(theta, alpha, group_size)
    # Angles and logarithms are off by a few u each, and by what rounding direct and cross moves them: at most 1 u more.
    reach = weight_K.abs() @ (thetas.abs() + alphas.log().abs() + 2)
    bound = ROUNDINGS * U * alpha * (1 + reach)
    assert_close(blocks(blend(rotations, weights)), blocks(wanted), bound, "a blend of road_1")


def _road_1(theta: Tensor, alpha: Tensor, group_size: int) -> Rotation:
    """[P], [P] -> [D], written out: the j-th pair of a group is its j-th and (j + G/2)-th element."""
    direct, cross = torch.empty(2, 2 * len(theta), dtype=torch.float64)
    for number, (i, k) in enumerate(pairs(2 * len(theta), group_size)):
        direct[i] = direct[k] = alpha[number] * torch.cos(theta[number])
        cross[i] = cross[k] = alpha[number] * torch.sin(theta[number])
    return Rotation(direct, cross, group_size)


def _error_of_logarithm(rotation: Rotation, generator: Tensor) -> Tensor:
    sensitivity = _size_of_inverse(_derivative_of_exp(generator)) * norm(blocks(rotation))
    return ROUNDINGS * U * (sensitivity + norm(generator))


def _error_of_exponential(generator: Tensor, error: Tensor) -> Tensor:
    """Of two computations of it, one of which is the dense one."""
    passed_on = _size(_derivative_of_exp(generator)) * (error + 2 * ROUNDINGS * U * norm(generator))
    return passed_on + 2 * ROUNDINGS * U * norm(torch.linalg.matrix_exp(generator))


def error_of_power(rotation: Rotation, exponent: float) -> Tensor:
    """Of either way to it: integers are multiplied."""
    generator = blocks(logarithm(rotation))
    error = abs(exponent) * _error_of_logarithm(rotation, generator)
    by_logarithm = _error_of_exponential(exponent * generator, error)
    if not float(exponent).is_integer():
        return by_logarithm
    factor = blocks(rotation) if exponent >= 0 else torch.linalg.inv(blocks(rotation))
    condition = 1.0 if exponent >= 0 else norm(blocks(rotation)) * norm(factor)
    by_products = 2 * ROUNDINGS * abs(exponent) * U * condition * norm(factor) ** abs(exponent)
    return by_logarithm + by_products


def error_of_blend(rotations: Sequence[Rotation], weights: Sequence[float]) -> Tensor:
    generators = [blocks(logarithm(rotation)) for rotation in rotations]
    error = torch.zeros(len(generators[0]), dtype=torch.float64)
    total = torch.zeros_like(generators[0])
    for rotation, weight, generator in zip(rotations, weights, generators, strict=True):
        error += abs(weight) * (_error_of_logarithm(rotation, generator) + len(rotations) * U * norm(generator))
        total += weight * generator
    return _error_of_exponential(total, error)


def _derivative_of_exp(generator: Tensor) -> Tensor:
    """The derivative of exp at ``[P, 2, 2]`` as a matrix ``[P, 4, 4]``: exp [[L, E], [0, L]] has it in its corner."""
    directions = torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2).expand(4, len(generator), 2, 2)
    upper = torch.cat((generator.expand(4, -1, -1, -1), directions), dim=-1)
    lower = torch.cat((torch.zeros_like(directions), generator.expand(4, -1, -1, -1)), dim=-1)
    corner = torch.linalg.matrix_exp(torch.cat((upper, lower), dim=-2))[..., :2, 2:]
    return corner.flatten(-2).movedim(0, -1)


def _size(derivative: Tensor) -> Tensor:
    return torch.linalg.svdvals(derivative)[..., 0]


def _size_of_inverse(derivative: Tensor) -> Tensor:
    return 1 / torch.linalg.svdvals(derivative)[..., -1]


def norm(matrices: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrices)


def assert_close(got: Tensor, wanted: Tensor, bound: Tensor, what: str) -> None:
    """|got - wanted| <= bound in each block, ``[P, 2, 2]``, in the Frobenius norm."""
    assert got.dtype == torch.float64, f"{what}: got dtype {got.dtype}; wanted float64"
    error = norm(got - wanted)
    wrong = ~(error <= bound)
    assert not bool(wrong.any()), (
        f"{what}: {int(wrong.sum())} of {len(wrong)} blocks differ by more than rounding can; got an error of "
        f"{float((error / bound).nan_to_num(math.inf).max()):.3g} times the bound"
    )


def assert_same_rotation(got: Rotation, wanted: Rotation, what: str) -> None:
    assert got.group_size == wanted.group_size
    assert_same_bits(got.direct, wanted.direct, f"{what}: direct")
    assert_same_bits(got.cross, wanted.cross, f"{what}: cross")
