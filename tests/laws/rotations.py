"""The laws of rotations, as functions that raise AssertionError where one is broken.

Bounds are derived, never tuned. With u the unit roundoff of the dtype computed in, a product and a sum round by u each, so
a rotation of x is off by at most 2u ``|R| |x|`` in each element, and each further rotation adds as much; a result in half
precision has one rounding more. ``|R|`` is the matrix of absolute values. `ROOM` covers the terms in u squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tests.laws.bounds import assert_within, wide
from tests.laws.reference import dense, pairs
from torch import Tensor

from roadie.rotation import Rotation, compose, inverse, rotate, rotate_weight, shard, to_parameters
from roadie.rotation import from_parameters as make_rotation
from roadie.testing.accuracy import smallest_step, unit_roundoff

ROOM = 1 + 2**-6


def apply_dense(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """x ``[..., D]`` through each ``[D, D]`` in order, in float64."""
    result = x.double()
    for matrix in matrices:
        result = result @ matrix.mT
    return result


def check_one_rounding(x: Tensor, *rotations: Rotation) -> None:
    """``rotate`` gives R x in x's dtype, computed in float32 or wider, with one rounding at the end."""
    before = x.clone()
    z = rotate(x, *rotations)
    assert z.dtype == x.dtype, f"got dtype {z.dtype}; wanted {x.dtype}"
    assert torch.equal(x, before), "rotate wrote to its input"
    matrices = [dense(rotation) for rotation in rotations]
    truth, reach = apply_dense(x, matrices), apply_dense(x.abs(), [m.abs() for m in matrices])
    inside = 2 * len(rotations) * unit_roundoff(wide(x.dtype)) * reach
    last = unit_roundoff(x.dtype) * truth.abs() + smallest_step(x.dtype) / 2 if x.dtype != wide(x.dtype) else 0.0
    assert_within(z, truth, (inside + last) * ROOM + smallest_step(wide(x.dtype)), "rotate")


def check_composing_is_applying_twice(x: Tensor, outer: Rotation, inner: Rotation) -> None:
    """``rotate(x, compose(outer, inner)) = rotate(rotate(x, inner), outer) = R_outer R_inner x``; x in float32 or wider."""
    matrices = [dense(inner), dense(outer)]
    truth, reach = apply_dense(x, matrices), apply_dense(x.abs(), [m.abs() for m in matrices])
    bound = 4 * unit_roundoff(x.dtype) * reach * ROOM
    assert_within(rotate(rotate(x, inner), outer), truth, bound, "one after the other")
    assert_within(rotate(x, inner, outer), truth, bound, "both in one call")
    assert_within(rotate(x, compose(outer=outer, inner=inner)), truth, bound, "composed")


def check_inverse_undoes(x: Tensor, rotation: Rotation) -> None:
    """``rotate(rotate(x, r), inverse(r)) = x``, from either side, up to the cancellation in the determinants."""
    back, forth = inverse(rotation), rotation
    matrix = dense(rotation)
    exact = torch.linalg.inv(matrix)
    u = unit_roundoff(rotation.direct.dtype)
    cancelled = _cancellation(rotation)
    for turns, matrices in (((forth, back), (matrix, exact)), ((back, forth), (exact, matrix))):
        reach = apply_dense(x.abs(), [m.abs() for m in matrices])
        bound = (4 * unit_roundoff(x.dtype) + u * (2 + 2 * cancelled)) * reach * ROOM
        assert_within(rotate(rotate(x, turns[0]), turns[1]), x, bound, "there and back")


def _cancellation(rotation: Rotation) -> float:
    """How much of the determinant of the worst block cancels: ``(|a11 a22| + |a12 a21|) / |a11 a22 - a12 a21|``."""
    matrix = dense(rotation)
    i, k = (torch.tensor(members) for members in zip(*pairs(len(matrix), rotation.group_size), strict=True))
    straight, crossed = matrix[i, i] * matrix[k, k], matrix[i, k] * matrix[k, i]
    return float(((straight.abs() + crossed.abs()) / (straight - crossed).abs()).max())


def check_rotated_weight_is_rotated_output(x: Tensor, weight: Tensor, bias: Tensor, rotation: Rotation) -> None:
    """``R (W x + b) = (R W) x + R b``, for a weight ``[D, in]`` and its transpose; x in float32 or wider."""
    turned, turned_bias = rotate_weight(weight, rotation), rotate_weight(bias, rotation)
    lying = rotate_weight(weight.mT.contiguous(), rotation, dim=1)
    assert turned.dtype == weight.dtype
    matrix = dense(rotation)
    truth = apply_dense(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), [matrix])
    size = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    bound = (weight.shape[1] + 3) * unit_roundoff(x.dtype) * apply_dense(size, [matrix.abs()]) * ROOM
    linear = torch.nn.functional.linear
    assert_within(rotate(linear(x, weight, bias), rotation), truth, bound, "linear, then rotated")
    assert_within(linear(x, turned, turned_bias), truth, bound, "rotated weight, then linear")
    assert_within(linear(x, lying.mT, turned_bias), truth, bound, "rotated transposed weight, then linear")


def check_shards_make_the_whole(x: Tensor, rotation: Rotation, world_size: int) -> None:
    """Each rank rotates its own slice of the outputs; together they are the whole, bit for bit."""
    width = rotation.out_features // world_size
    parts = [
        rotate(x[..., rank * width : (rank + 1) * width], shard(rotation, rank, world_size))
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(parts, dim=-1), rotate(x, rotation)), "the shards are not the whole"


def check_parameters_come_back(rotation: Rotation, variant: str) -> None:
    """``from_parameters(to_parameters(r)) = r``, with angles in (-pi, pi] and no negative alpha."""
    theta, alpha = to_parameters(rotation, variant)
    assert bool((theta.abs() <= torch.pi * ROOM).all()), "an angle is out of (-pi, pi]"
    assert bool((alpha >= 0).all()), "a negative alpha"
    again = make_rotation(theta, alpha, variant, rotation.group_size)
    assert again.group_size == rotation.group_size
    # atan2, hypot, cos and sin: 1 ulp each; an angle near pi rounds by 4u, which moves sine and cosine by as much.
    size = torch.hypot(rotation.direct.double(), rotation.cross.double())
    bound = 16 * unit_roundoff(rotation.direct.dtype) * size
    assert_within(again.direct, rotation.direct, bound, "direct")
    assert_within(again.cross, rotation.cross, bound, "cross")
