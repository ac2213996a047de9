"""Powers and blends of rotations: the algebra that needs a logarithm.

A blend of rotations R_k with weights w_k is ``exp(sum of w_k log R_k)``, pair by pair, with the principal logarithm of each
2 x 2 block (the angle in (-pi, pi]). It is again one block a pair, so that it costs what any rotation costs. It agrees with
what one would expect where that is clear:

    one adapter, weight 1       the adapter itself, bit for bit
    one adapter, integer n      R multiplied |n| times, inverted where n < 0; needs no logarithm
    blocks that commute         the product of the powers; for road_1: alphas to the weights, thetas times the weights
    nothing, or weights 0       the identity

Blocks without a real logarithm are refused unless an integer weight of a single adapter makes it unnecessary: those of
determinant <= 0, and those with negative eigenvalues other than -t I, which is a half turn, by +pi.

**A function of a block.** ``M = t I + N`` with t half the trace; ``N^2 = d I`` and ``s = sqrt|d|``. Its eigenvalues are t +- s
where it stretches (d >= 0) and t +- i s where it turns (d < 0), and for every smooth f

    it stretches    f(M) = f(l) I + slope (M - l I)    l = t - s, slope = (f(t + s) - f(t - s)) / 2s, or f'(t) where s = 0
    it turns        f(M) = Re f(z) I + slope N         z = t + i s, slope = Im f(z) / s

so that a result is a base on the diagonal and a multiple of the block, with no case in between: near s = 0 both say the same.

**Gradients** reach every block a result depends on, in closed form (derivatives.py): they are finite wherever the result is
differentiable, above all where training starts, at the identity. There a blend's gradient is each weight times that of its
adapter alone.

All arithmetic is in float64. Legend: D out features, P = D/2 pairs; tensors are ``[..., D]``, equal or mirrored in a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from roadie.algebra.derivatives import Derivative, Spectrum, differentiable, of_exponential, of_logarithm
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, determinant, identity, inverse, swap_unsigned

# A difference of two products in float64 is right to this part of the sum of their sizes: 4 roundings.
CANCELLATION = 2 * torch.finfo(torch.float64).eps


def power(rotation: Rotation, exponent: float) -> Rotation:
    """``R^exponent``, in float64: by multiplication where the exponent is an integer, else by the principal logarithm.

    Raises `AdapterError`, naming the outputs, where a block is not finite, has no inverse (negative integers) or no real
    logarithm, or where its power is too large for float64.
    """
    if not math.isfinite(exponent):
        raise AdapterError(f"got exponent {exponent}; wanted a finite number")
    _check_finite(rotation, "a block", "check the parameters of the adapter")
    if float(exponent).is_integer():
        result = _integer_power(wide(rotation), int(exponent))
    else:
        result = _exponential(_scaled(logarithm(rotation), exponent))
    _check_finite(result, f"the power {exponent:g} of a block", "use a smaller exponent")
    return result


def blend(rotations: Sequence[Rotation], weights: Sequence[float], *, names: Sequence[str] = ()) -> Rotation:
    """``exp(sum of w_k log R_k)`` a pair, in float64; see the module for what it reduces to.

    rotations: one or more, of one D and group size; weights: as many finite numbers; names: what errors call the rotations.
    Rotations of weight 0 are ignored.
    Raises `ConfigError` for different group sizes, `AdapterError` as `power` does, and where the numbers do not match.
    """
    _check_blend(rotations, weights)
    names = names or [f"rotation {index} of {len(rotations)}" for index in range(len(rotations))]
    parts = [(index, weight) for index, weight in enumerate(weights) if weight != 0]
    if not parts:
        return identity_like(rotations[0])
    if len(parts) == 1:
        index, weight = parts[0]
        with _about(names[index]):
            return power(rotations[index], weight)
    generators = []
    for index, weight in parts:
        with _about(names[index]):
            generators.append(_scaled(logarithm(rotations[index]), weight))
    result = _exponential(_sum(generators))
    _check_finite(result, f"the blend of a block with weights {list(weights)}", "use smaller weights")
    return result


def logarithm(rotation: Rotation) -> Rotation:
    """The principal logarithm of each block, written as direct and cross of a block; in float64.

    Raises `AdapterError`, naming the outputs, where a block is not finite or has none.
    """
    _check_finite(rotation, "a block", "check the parameters of the adapter")
    return differentiable(_logarithm, _derivative_of_logarithm, wide(rotation))


def _logarithm(rotation: Rotation) -> Rotation:
    det, spectrum = determinant(rotation), _spectrum(rotation)
    _check_logarithm(rotation, det, spectrum)
    middle, half_turn = spectrum.middle, spectrum.is_half_turn
    lower, slope = _lower_eigenvalue(spectrum, det), _slope_of_logarithm(spectrum, det)
    base = torch.where(spectrum.turns, torch.hypot(middle, spectrum.root).log(), lower.log())
    base = torch.where(half_turn, middle.abs().log(), base)
    cross = torch.where(half_turn, math.pi, slope * rotation.cross)
    return Rotation(base + slope * spectrum.offset, cross, rotation.group_size)


def _slope_of_logarithm(spectrum: Spectrum, det: Tensor) -> Tensor:
    middle, root, lower = spectrum.middle, spectrum.root, _lower_eigenvalue(spectrum, det)
    rise = torch.where(spectrum.turns, torch.atan2(root, middle) / root, torch.log1p(2 * root / lower) / (2 * root))
    return torch.where(root > 0, rise, 1 / middle)


def _lower_eigenvalue(spectrum: Spectrum, det: Tensor) -> Tensor:
    """The one nearer to 0, where the block stretches; middle - root would cancel."""
    return det / (spectrum.middle + spectrum.root)


def _derivative_of_logarithm(rotation: Rotation) -> Derivative:
    det, spectrum = determinant(rotation), _spectrum(rotation)
    return of_logarithm(rotation, spectrum, _slope_of_logarithm(spectrum, det), det)


def _exponential(generator: Rotation) -> Rotation:
    """exp of each block."""
    return differentiable(_exponential_alone, _derivative_of_exponential, generator)


def _exponential_alone(generator: Rotation) -> Rotation:
    spectrum = _spectrum(generator)
    middle, root = spectrum.middle, spectrum.root
    slope = _slope_of_exponential(spectrum)
    base = torch.where(spectrum.turns, middle.exp() * root.cos(), (middle - root).exp())
    return Rotation(base + slope * spectrum.offset, slope * generator.cross, generator.group_size)


def _slope_of_exponential(spectrum: Spectrum) -> Tensor:
    middle, root, turns = spectrum.middle, spectrum.root, spectrum.turns
    rise = torch.where(
        turns, middle.exp() * root.sin() / root, (middle + root).exp() * -torch.expm1(-2 * root) / (2 * root)
    )
    return torch.where(root > 0, rise, middle.exp())


def _derivative_of_exponential(generator: Rotation) -> Derivative:
    spectrum = _spectrum(generator)
    return of_exponential(generator, spectrum, _slope_of_exponential(spectrum))


def _spectrum(block: Rotation) -> Spectrum:
    direct, cross = block.direct, block.cross
    partner, partner_cross = swap_unsigned(direct, block.group_size), swap_unsigned(cross, block.group_size)
    deviation = (direct - partner) / 2
    size = torch.maximum(deviation.abs(), torch.maximum(cross.abs(), partner_cross.abs()))
    unit = torch.where(size > 0, size, 1.0)  # so that no square overflows or vanishes
    n, product = deviation / unit, (cross / unit) * (partner_cross / unit)
    discriminant = n.square() - product
    turns = discriminant < -CANCELLATION * (n.square() + product.abs())
    root = torch.where(turns, -discriminant, discriminant.clamp(min=0)).sqrt()
    # root + n, which cancels where n < 0: there it is (root^2 - n^2) / (root - n).
    above = torch.where(n < 0, -product / (root - n), root + n)
    return Spectrum((direct + partner) / 2, root * unit, turns, torch.where(turns, n, above) * unit, size == 0)


def _integer_power(rotation: Rotation, exponent: int) -> Rotation:
    """By squaring; exponent 1 gives the rotation itself."""
    if exponent == 0:
        return identity_like(rotation)
    factor = inverse(rotation) if exponent < 0 else rotation
    result = factor
    for bit in reversed(range(abs(exponent).bit_length() - 1)):
        result = compose(result, result)
        if abs(exponent) >> bit & 1:
            result = compose(result, factor)
    return result


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Errors inside say which rotation they are about."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None


def _check_blend(rotations: Sequence[Rotation], weights: Sequence[float]) -> None:
    if len(rotations) != len(weights) or not rotations:
        raise AdapterError(
            f"got {len(rotations)} rotations and {len(weights)} weights; wanted as many, and at least one"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(f"got weights {list(weights)}; wanted finite numbers")
    sizes = sorted({rotation.group_size for rotation in rotations})
    if len(sizes) > 1:
        raise ConfigError(
            f"got group sizes {sizes}; wanted one, because two sizes share no pair of outputs, so that a blend of them is no "
            "rotation of pairs; train the adapters with one group_size"
        )
    widths = sorted({rotation.out_features for rotation in rotations})
    if len(widths) > 1:
        raise AdapterError(f"got rotations of {widths} outputs; wanted equal numbers; blend adapters of the same layer")


def _check_logarithm(rotation: Rotation, det: Tensor, spectrum: Spectrum) -> None:
    straight = rotation.direct * swap_unsigned(rotation.direct, rotation.group_size)
    rounding = CANCELLATION * (straight.abs() + (det - straight).abs())
    negative = ~spectrum.turns & ~spectrum.is_scalar & (spectrum.middle <= 0)
    without = ~((det > rounding) & torch.isfinite(det)) | negative
    if not bool(without.any()):
        return
    pair, outputs = _first_pair(without, rotation.group_size)
    reason = _reason(float(det[pair]), float(rounding[pair]))
    raise AdapterError(
        f"got a block without a real logarithm ({outputs}: {reason}, determinant {float(det[pair]):g}); wanted a positive "
        "determinant and no negative eigenvalues, which blends and powers that are no integers need; use an integer weight of "
        "this adapter alone, or train it as road_1"
    )


def _reason(det: float, rounding: float) -> str:
    if not math.isfinite(det):
        return "too large"
    if det > rounding:
        return "two negative eigenvalues"
    return "mirrored" if det < -rounding else "singular"


def _check_finite(rotation: Rotation, what: str, advice: str) -> None:
    wrong = ~(torch.isfinite(rotation.direct) & torch.isfinite(rotation.cross))
    if bool(wrong.any()):
        _, outputs = _first_pair(wrong | swap_unsigned(wrong, rotation.group_size), rotation.group_size)
        raise AdapterError(f"got {what} that is not finite ({outputs}); wanted finite numbers; {advice}")


def _first_pair(marked: Tensor, group_size: int) -> tuple[tuple[int, ...], str]:
    """Where the first marked pair's first member is, of pairs marked at both members, and the two outputs in words."""
    index = tuple(marked.nonzero()[0].tolist())
    return index, f"outputs {index[-1]} and {index[-1] + group_size // 2}"


def _sum(generators: Sequence[Rotation]) -> Rotation:
    direct, cross = generators[0].direct, generators[0].cross
    for generator in generators[1:]:
        direct, cross = direct + generator.direct, cross + generator.cross
    return Rotation(direct, cross, generators[0].group_size)


def _scaled(generator: Rotation, factor: float) -> Rotation:
    return Rotation(generator.direct * factor, generator.cross * factor, generator.group_size)


def wide(rotation: Rotation) -> Rotation:
    """The rotation in float64."""
    return Rotation(rotation.direct.double(), rotation.cross.double(), rotation.group_size)


def identity_like(rotation: Rotation) -> Rotation:
    """The identity of as many outputs, in float64."""
    one = identity(rotation.out_features, rotation.group_size, dtype=torch.float64, device=rotation.direct.device)
    shape = rotation.direct.shape
    return Rotation(one.direct.expand(shape), one.cross.expand(shape), rotation.group_size)
