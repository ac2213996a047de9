"""The derivative of a function of 2 x 2 blocks: what gradients of powers and blends go through.

A block is ``M = t I + N``, t half its trace, and ``N^2 = d I``; its eigenvalues are ``t +- sqrt d``. A smooth f of it depends
on t and d only (Higham, Functions of Matrices, 2008, ch. 3, for the derivative of functions of matrices):

    f(M) = u I + v N      u = (f(t + sqrt d) + f(t - sqrt d)) / 2      v = (f(t + sqrt d) - f(t - sqrt d)) / (2 sqrt d)

Both are power series in d, so that nothing happens where eigenvalues meet; that autograd divides 0 by 0 there is the square
root's doing. In a direction ``E = e I + F``, F without trace, ``t' = e`` and ``d' = 2 q``, half the trace of NF + FN, and with

    du/dt = m, the mean of f' at both eigenvalues      dv/dt = k = (f'(t + sqrt d) - f'(t - sqrt d)) / (2 sqrt d)
    du/dd = k / 2                                      dv/dd = (m - v) / 2d

the derivative is ``L(M)[E] = v E + ((m - v) e + k q) I + (k e + (m - v) q / d) N``. For the two functions needed here

    exp    m = u    k = v                log    m = t / det M    k = -1 / det M

and (m - v) / d, which cancels where d is small, has a series there. N is counted in a unit of its own, ``N = size * unit``,
so that no square overflows or vanishes; the four numbers a block needs then are those of `Derivative`.

The gradient is the transpose of this map, which is the derivative at the transposed block: ``L(M)^T = L(M^T)``.

**Where there is none.** log jumps by 2 pi i at a half turn, -t I, where it is +pi by convention. There the derivative is that
among turns and scalings, which are all of road_1: ``L[E] = C / -t``, C what of E commutes with turns. The rest of E, in which
log has no slope or an infinite one, counts nothing. Beside a half turn the slope is the true one: pi over the distance, in
all directions but those of turns and scalings. There a gradient of direct and cross has large parts that cancel in road_1's
theta, once the two rows of a pair are added; in float32 they do so to 7 digits only.

First derivatives only: backward and forward mode; to differentiate a gradient raises RuntimeError.

All arithmetic is in float64, O(D). Tensors are ``[..., D]``, equal or mirrored in a pair, as in powers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from roadie.rotation import Rotation, swap_unsigned


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of each block, and what of its diagonal the slope multiplies; ``[..., D]`` each."""

    middle: Tensor  # t, half the trace
    root: Tensor  # s >= 0: the eigenvalues are t +- s, or t +- i s where it turns
    turns: Tensor  # bool: the eigenvalues are complex, by more than rounding makes them
    offset: Tensor  # the row's element on the diagonal, less t - s; less t where it turns
    is_scalar: Tensor  # bool: the block is t I

    @property
    def is_half_turn(self) -> Tensor:
        """Bool: the block is -t I, a half turn by +pi."""
        return self.is_scalar & (self.middle < 0)


@dataclass(frozen=True, eq=False)
class Derivative:
    """L at each block: ``L[E] = slope E + (excess e + tilt q) I + (tilt e + bend q) unit``; ``[..., D]`` each.

    e: half the trace of E; q: half the trace of (unit E), which is 0 for E = I.
    """

    slope: Tensor  # v
    excess: Tensor  # m - v
    tilt: Tensor  # k size
    bend: Tensor  # (m - v) size^2 / d
    unit: Rotation  # N / size

    def along(self, change: Rotation) -> Rotation:
        """``L[change]``."""
        direct, cross, size = change.direct, change.cross, change.group_size
        partner, partner_cross = swap_unsigned(direct, size), swap_unsigned(cross, size)
        crossing = self.unit.cross * partner_cross + swap_unsigned(self.unit.cross, size) * cross
        e, q = (direct + partner) / 2, (self.unit.direct * (direct - partner) - crossing) / 2
        along_unit = self.tilt * e + self.bend * q
        return Rotation(
            self.slope * direct + self.excess * e + self.tilt * q + along_unit * self.unit.direct,
            self.slope * cross + along_unit * self.unit.cross,
            size,
        )

    def transposed(self) -> Derivative:
        """L at the transposed blocks, which is the transpose of L."""
        cross = -swap_unsigned(self.unit.cross, self.unit.group_size)
        unit = Rotation(self.unit.direct, cross, self.unit.group_size)
        return Derivative(self.slope, self.excess, self.tilt, self.bend, unit)


# The series of (m - v) / d stands up to d = 1 (exp) and d = (t / 4)^2 (log), each to less than the rounding of its first term.
# Beyond it the difference loses at most 24 times its rounding.
_SERIES_OF_EXPONENTIAL = tuple(2 * k / math.factorial(2 * k + 1) for k in range(1, 10))
_SERIES_OF_LOGARITHM = tuple(2 * k / (2 * k + 1) for k in range(1, 15))


def of_exponential(block: Rotation, spectrum: Spectrum, slope: Tensor) -> Derivative:
    """The derivative of exp; slope: v, as exp computes it."""
    middle, root, turns = spectrum.middle, spectrum.root, spectrum.turns
    near = root < 1
    size = torch.where(near, 1.0, root)
    d = _signed(root.square(), turns)
    bend = middle.exp() * _polynomial(_SERIES_OF_EXPONENTIAL, d)
    stretched = ((middle + root).exp() + (middle - root).exp()) / 2
    beyond = torch.where(turns, middle.exp() * root.cos(), stretched) - slope
    return Derivative(
        slope,
        torch.where(near, bend * d, beyond),
        slope * size,
        torch.where(near, bend, _signed(beyond, turns)),
        _unit(block, size),
    )


def of_logarithm(block: Rotation, spectrum: Spectrum, slope: Tensor, det: Tensor) -> Derivative:
    """The derivative of log, at half turns that among turns and scalings; slope: v, as log computes it."""
    middle, root, half_turn = spectrum.middle, spectrum.root, spectrum.is_half_turn
    turns = spectrum.turns | half_turn
    near = root < middle / 4
    size = torch.where(near, middle, root)
    ratio = _signed((root / middle).square(), turns)
    bend = _polynomial(_SERIES_OF_LOGARITHM, ratio) / middle
    slope = torch.where(half_turn, 0.0, slope)
    beyond = middle / det - slope
    unit = _unit(block, torch.where(half_turn, 1.0, size))
    return Derivative(
        slope,
        torch.where(near, bend * ratio, beyond),
        -size / det,
        torch.where(near, bend, _signed(beyond, turns)),
        Rotation(unit.direct, torch.where(half_turn, 1.0, unit.cross), unit.group_size),
    )


def _unit(block: Rotation, size: Tensor) -> Rotation:
    """``N / size``."""
    deviation = (block.direct - swap_unsigned(block.direct, block.group_size)) / 2
    return Rotation(deviation / size, block.cross / size, block.group_size)


def _signed(value: Tensor, turns: Tensor) -> Tensor:
    return torch.where(turns, -value, value)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, coefficients from that of 1 up."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def differentiable(
    value: Callable[[Rotation], Rotation], derivative: Callable[[Rotation], Derivative], block: Rotation
) -> Rotation:
    """``value(block)``, whose gradient and forward-mode derivative are those of `derivative`; `value` may raise.

    block: in float64; one gradient deep.
    """
    direct, cross = _Function.apply(block.direct, block.cross, block.group_size, value, derivative)
    return Rotation(direct, cross, block.group_size)


class _Function(torch.autograd.Function):
    """A function of blocks with a derivative of its own."""

    @staticmethod
    def forward(
        direct: Tensor, cross: Tensor, group_size: int, value: Callable[[Rotation], Rotation], _: object
    ) -> tuple[Tensor, Tensor]:
        result = value(Rotation(direct, cross, group_size))
        return result.direct, result.cross

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        direct, cross, ctx.group_size, _, ctx.derivative = inputs
        ctx.save_for_backward(direct, cross)
        ctx.save_for_forward(direct, cross)

    @staticmethod
    def jvp(ctx: Any, direct: Tensor, cross: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        change = _at(ctx).along(Rotation(direct, cross, ctx.group_size))
        return change.direct, change.cross

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direct: Tensor, cross: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _at(ctx).transposed().along(Rotation(direct, cross, ctx.group_size))
        return gradient.direct, gradient.cross, None, None, None


def _at(ctx: Any) -> Derivative:
    direct, cross = ctx.saved_tensors
    found: Derivative = ctx.derivative(Rotation(direct, cross, ctx.group_size))
    return found
