"""The mathematics of RoAd: everything an adapter does to a layer is one `Rotation`.

A linear layer gives ``h = W x + b`` with ``D = out_features`` elements. RoAd returns ``z = R h``, where R is block
diagonal with one 2 x 2 block a pair of elements (Liao & Monz 2024, arXiv 2409.00119, eq. 4). For every variant

    z = direct * h + cross * J(h)            J swaps the members of each pair and negates the first:
                                             J(h1, h2) = (-h2, h1)

so the block of a pair is      [ direct1  -cross1 ]
                               [ cross2   direct2 ]

**Pairing.** Elements are taken in groups of ``group_size`` G; inside a group element j pairs with j + G/2.
G = 2 is the paper's pairing of neighbours. Two group sizes share no pair, so they do not compose.

**Chains.** Rotations of several group sizes in a row, the first applied first, mix outputs across pairs: a chain, of which a
plain adapter is the shortest. Its parameters lie end to end, rotation after rotation.

**Variants** differ only in how many parameters make the two vectors; `from_parameters` is the one place that knows them.

    road_1   one alpha, one theta a pair     theta, alpha: [D/2]   stored [D/G, G/2]
    road_2   one alpha, one theta a row      theta, alpha: [D]     stored in output order
    road_4   all four entries free           theta, alpha: [2D]    stored [D/G, 2, G]: direct's G, then cross's G

with ``direct = alpha cos theta`` and ``cross = alpha sin theta``.

**Precision.** Arithmetic is in float32, or in float64 where an operand is float64; there is one rounding, to the
dtype of the tensor that was rotated.

Shapes: ``D`` out features, ``G`` group size, ``P = D/2`` pairs, ``n`` parameters, ``...`` leading dimensions that
broadcast, so a Rotation may be one adapter ``[D]``, a table ``[S, D]`` or one a row of a batch ``[B, 1, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from roadie.errors import AdapterError, ConfigError


class Variant(str, Enum):
    """How many parameters a pair of outputs has; see the table at the top of this module."""

    ROAD_1 = "road_1"
    ROAD_2 = "road_2"
    ROAD_4 = "road_4"

    @classmethod
    def parse(cls, value: str | Variant) -> Variant:
        """The variant named `value`; raises `ConfigError` for any other name."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(
                f"Invalid variant {value} specified. Please choose from road_1, road_2 or road_4 (got {value!r})."
            ) from None


@dataclass(frozen=True, eq=False)
class Rotation:
    """One 2 x 2 block a pair of outputs: ``z = direct * h + cross * J(h)``.

    direct, cross: ``[..., D]``, equal shape and dtype; group_size: even, divides D.
    """

    direct: Tensor
    cross: Tensor
    group_size: int

    @property
    def out_features(self) -> int:
        """D, the number of outputs that are rotated."""
        return self.direct.shape[-1]


def check_group_size(group_size: int, width: int | None = None, name: str = "out_features") -> None:
    """Raise `ConfigError` unless `group_size` is a positive even integer that divides `width` (where given).

    name: of the width, "out_features" or "in_features".
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size <= 0 or group_size % 2:
        raise ConfigError(
            f"The group_size must be divisible by 2 when using RoadLayer, but got {group_size}. "
            "Wanted a positive even integer; try group_size=64."
        )
    if width is None or width % group_size == 0:
        return
    fitting = largest_fitting_group_size(group_size, width)
    what = name.removesuffix("_features") + "puts"
    advice = f"try group_size={fitting}" if fitting else f"an odd number of {what} cannot be paired; exclude the layer"
    raise ConfigError(
        f"The {name} of the base layer must be divisible by group_size ({group_size}) when using RoadLayer. "
        f"Got {name}={width}; {advice}."
    )


def largest_fitting_group_size(group_size: int, out_features: int) -> int | None:
    """The largest even group size at most `group_size` that divides `out_features`; None where it is odd."""
    return next((size for size in range(group_size, 1, -2) if out_features % size == 0), None)


def parameter_size(variant: str | Variant, out_features: int) -> int:
    """Number of elements of theta (and of alpha) for a layer of `out_features` outputs."""
    variant = Variant.parse(variant)
    if variant is Variant.ROAD_1:
        return out_features // 2
    return out_features if variant is Variant.ROAD_2 else 2 * out_features


def from_parameters(theta: Tensor, alpha: Tensor, variant: str | Variant, group_size: int) -> Rotation:
    """The rotation that an adapter's parameters stand for, in float32 or wider; differentiable.

    theta (radians), alpha: ``[..., n]`` with n = `parameter_size`; the result is ``[..., D]``.
    Raises `AdapterError` where the shapes differ or n does not fit the variant and group size.
    """
    variant = Variant.parse(variant)
    _check_parameters(theta, alpha, variant, group_size)
    wide = _wide(theta.dtype, alpha.dtype)
    theta, alpha = theta.to(wide), alpha.to(wide)
    direct, cross = alpha * torch.cos(theta), alpha * torch.sin(theta)
    if variant is Variant.ROAD_2:
        return Rotation(direct, cross, group_size)
    if variant is Variant.ROAD_1:
        return Rotation(_for_both(direct, group_size), _for_both(cross, group_size), group_size)
    return Rotation(_quarter(direct, 0, group_size), _quarter(cross, 1, group_size), group_size)


def chain_from_parameters(
    theta: Tensor, alpha: Tensor, variant: str | Variant, group_sizes: Sequence[int]
) -> tuple[Rotation, ...]:
    """The rotations of a chain, the first applied first, one for each of `group_sizes`; differentiable.

    theta, alpha: ``[..., K n]`` for K group sizes, rotation after rotation. Raises as `from_parameters` does.
    """
    if len(group_sizes) == 1:
        return (from_parameters(theta, alpha, variant, group_sizes[0]),)
    parts = zip(split_stages(theta, len(group_sizes)), split_stages(alpha, len(group_sizes)), group_sizes, strict=True)
    return tuple(from_parameters(of_theta, of_alpha, variant, group_size) for of_theta, of_alpha, group_size in parts)


def split_stages(stored: Tensor, num_stages: int) -> tuple[Tensor, ...]:
    """``[..., K n]`` -> K times ``[..., n]``, the part of each rotation (views); raises `AdapterError` where they do not fit."""
    if not num_stages or stored.shape[-1] % num_stages:
        raise AdapterError(
            f"got {stored.shape[-1]} parameters for {num_stages} rotations in a row; wanted as many for each of them; check "
            "the stages of the adapter"
        )
    return stored.chunk(num_stages, dim=-1) if num_stages > 1 else (stored,)


def _check_parameters(theta: Tensor, alpha: Tensor, variant: Variant, group_size: int) -> None:
    check_group_size(group_size)
    if theta.shape != alpha.shape or theta.dim() == 0:
        raise AdapterError(
            f"got theta {tuple(theta.shape)} and alpha {tuple(alpha.shape)}; wanted equal shapes [..., n]"
        )
    unit = {Variant.ROAD_1: group_size // 2, Variant.ROAD_2: group_size, Variant.ROAD_4: 2 * group_size}[variant]
    if theta.shape[-1] % unit:
        raise AdapterError(
            f"got {theta.shape[-1]} parameters for {variant.value} with group_size={group_size}; "
            f"wanted a multiple of {unit}; check the variant and the group size of the adapter"
        )


def _for_both(per_pair: Tensor, group_size: int) -> Tensor:
    """[..., P] -> [..., D]: one value a pair, given to both members."""
    groups = per_pair.unflatten(-1, (-1, 1, group_size // 2))
    return groups.expand(*groups.shape[:-2], 2, group_size // 2).flatten(-3)


def _quarter(stored: Tensor, which: int, group_size: int) -> Tensor:
    """[..., 2D] -> [..., D]: road_4 stores direct's G values of a group, then cross's."""
    return stored.unflatten(-1, (-1, 2, group_size))[..., which, :].flatten(-2)


def parameter_gradients(
    grad_direct: Tensor, grad_cross: Tensor, theta: Tensor, alpha: Tensor, variant: str | Variant, group_size: int
) -> tuple[Tensor, Tensor]:
    """The adjoint of `from_parameters`: gradients of theta and alpha ``[..., n]`` from those of direct and cross ``[..., D]``.

    In the dtype of the gradients given. variant: one that `from_parameters` has taken; it is not checked again. For where a
    table is kept between steps, which autograd cannot do.
    """
    theta, alpha = theta.to(grad_direct.dtype), alpha.to(grad_direct.dtype)
    cosine, sine = torch.cos(theta), torch.sin(theta)
    if variant == Variant.ROAD_4:  # direct and cross have parameters of their own
        zero = torch.zeros_like(grad_direct)
        grad_direct = _interleaved(grad_direct, zero, group_size)
        grad_cross = _interleaved(zero, grad_cross, group_size)
    elif variant == Variant.ROAD_1:  # what both members of a pair add to the value they share
        pairs = (*grad_direct.shape[:-1], -1, 2, group_size // 2)
        grad_direct = grad_direct.view(pairs).sum(-2).flatten(-2)
        grad_cross = grad_cross.view(pairs).sum(-2).flatten(-2)
    grad_alpha = torch.addcmul(grad_direct * cosine, grad_cross, sine)
    grad_angle = torch.addcmul(grad_cross * cosine, grad_direct, sine, value=-1)
    return grad_angle * alpha, grad_alpha


def _interleaved(direct: Tensor, cross: Tensor, group_size: int) -> Tensor:
    """Two [..., D] -> [..., 2D] as road_4 stores them: G of one, G of the other."""
    groups = [vector.unflatten(-1, (-1, group_size)) for vector in (direct, cross)]
    return torch.stack(groups, dim=-2).flatten(-3)


def to_parameters(rotation: Rotation, variant: str | Variant, *, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Parameters (theta in (-pi, pi], alpha >= 0) whose rotation is `rotation`; ``[..., n]`` each.

    road_2 and road_4 express every rotation. road_1 expresses those whose two rows agree in each pair; where they
    differ by more than `tolerance` (absolute) it raises `AdapterError`. In road_4 direct and cross each have an
    (alpha, theta) of their own; the one written has the row's common angle.
    """
    variant = Variant.parse(variant)
    direct, cross, group_size = rotation.direct, rotation.cross, rotation.group_size
    if variant is Variant.ROAD_1:
        direct, cross = (_common(v, group_size, tolerance) for v in (direct, cross))
    theta, alpha = torch.atan2(cross, direct), torch.hypot(cross, direct)
    if variant is Variant.ROAD_4:
        return _twice(theta, group_size), _twice(alpha, group_size)
    return theta, alpha


def _common(vector: Tensor, group_size: int, tolerance: float) -> Tensor:
    """[..., D] -> [..., P]: the value both members of a pair share."""
    first, second = _halves(vector, group_size)
    worst = float((first - second).abs().max()) if first.numel() else 0.0
    if not worst <= tolerance:
        raise AdapterError(
            f"got a rotation whose rows differ by {worst:.3g} within a pair; road_1 needs both rows of every pair equal "
            f"(tolerance {tolerance:g}); use road_2, which expresses every rotation"
        )
    return first.flatten(-2)


def _twice(stored: Tensor, group_size: int) -> Tensor:
    groups = stored.unflatten(-1, (-1, group_size))
    return torch.stack((groups, groups), dim=-2).flatten(-3)


def pairs_of_parameters(variant: str | Variant, out_features: int, group_size: int, *, device: object = None) -> Tensor:
    """The pair that each place of theta (and of alpha) belongs to: int64 ``[n]``, pairs counted as in `to_blocks`.

    A pair's block depends on the parameters at its places, and on no others. Raises `ConfigError` for a bad group size.
    """
    variant = Variant.parse(variant)
    check_group_size(group_size, out_features)
    pairs = torch.arange(out_features // 2, device=device)  # type: ignore[call-overload]
    if variant is Variant.ROAD_1:
        return pairs
    rows = _for_both(pairs, group_size)
    return rows if variant is Variant.ROAD_2 else _twice(rows, group_size)


def identity(
    out_features: int, group_size: int, *, dtype: torch.dtype = torch.float32, device: object = None
) -> Rotation:
    """The rotation that changes nothing: direct = 1, cross = 0, both ``[D]``."""
    check_group_size(group_size, out_features)
    ones = torch.ones(out_features, dtype=dtype, device=device)  # type: ignore[call-overload]
    return Rotation(ones, torch.zeros_like(ones), group_size)


def rotate(x: Tensor, *rotations: Rotation) -> Tensor:
    """``R_k ... R_1 x`` along the last dimension: the rotations are applied in the order given.

    x: ``[..., D]``, any floating dtype; each rotation ``[D]`` or broadcastable to x. The result has x's dtype; it is
    computed in float32 (float64 for float64) and rounded once. Never writes to x.
    """
    for rotation in rotations:
        _check_out_features(x.shape[-1], rotation)
    wide = _wide(x.dtype, *(r.direct.dtype for r in rotations))
    z = x.to(wide)
    for rotation in rotations:
        pairs = rotate_pairs(*_halves(z, rotation.group_size), *pair_rows(rotation, wide))
        z = torch.stack(pairs, dim=-2).flatten(-3)
    return z.to(x.dtype) if rotations else x.clone()


def pair_rows(rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """direct1, cross1 (rows of the pairs' first members), direct2, cross2 (second): each ``[..., D/G, G/2]``."""
    direct1, direct2 = _halves(rotation.direct.to(dtype), rotation.group_size)
    cross1, cross2 = _halves(rotation.cross.to(dtype), rotation.group_size)
    return direct1, cross1, direct2, cross2


def rotate_pairs(
    first: Tensor, second: Tensor, direct1: Tensor, cross1: Tensor, direct2: Tensor, cross2: Tensor
) -> tuple[Tensor, Tensor]:
    """The product of each pair's block with the pair: the one place that says what a rotation computes.

    Each product and each sum is rounded by itself, so that the result is the same on every device.
    """
    return direct1 * first - cross1 * second, direct2 * second + cross2 * first


def swap(x: Tensor, group_size: int) -> Tensor:
    """J: swaps the members of each pair of the last dimension and negates the first, (h1, h2) -> (-h2, h1)."""
    first, second = _halves(x, group_size)
    return torch.stack((-second, first), dim=-2).flatten(-3)


def _halves(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[..., D] -> the first and the second members of all pairs, each [..., D/G, G/2] (views)."""
    groups = x.unflatten(-1, (-1, 2, group_size // 2))
    return groups[..., 0, :], groups[..., 1, :]


def rotate_weight(weight: Tensor, *rotations: Rotation, dim: int = 0) -> Tensor:
    """``R W``: the weight (or bias) of the layer whose outputs are the rotated ones, O(D * in_features).

    weight: ``[D, in]`` with dim=0 (nn.Linear), ``[in, D]`` with dim=1 (Conv1D), or a bias ``[D]`` with dim=0. The
    result has the weight's dtype, with one rounding.
    """
    if dim in (-1, weight.dim() - 1):
        return rotate(weight, *rotations)
    return rotate(weight.movedim(dim, -1), *rotations).movedim(-1, dim)


def compose(outer: Rotation, inner: Rotation) -> Rotation:
    """The rotation that applies `inner`, then `outer`: ``rotate(x, compose(outer, inner)) = rotate(rotate(x, inner), outer)``.

    Raises `ConfigError` where the group sizes differ: such products are not pair rotations.
    """
    if outer.group_size != inner.group_size:
        raise ConfigError(
            f"got group sizes {outer.group_size} and {inner.group_size}; a product is a pair rotation only within one "
            "group_size; apply the rotations one after the other instead"
        )
    _check_out_features(outer.out_features, inner)
    group_size = outer.group_size
    inner_direct, inner_cross = (swap_unsigned(v, group_size) for v in (inner.direct, inner.cross))
    return Rotation(
        outer.direct * inner.direct - outer.cross * inner_cross,
        outer.direct * inner.cross + outer.cross * inner_direct,
        group_size,
    )


def swap_unsigned(x: Tensor, group_size: int) -> Tensor:
    """Swaps the members of each pair of the last dimension: each row's value moves to its partner's row."""
    first, second = _halves(x, group_size)
    return torch.stack((second, first), dim=-2).flatten(-3)


def transposed(rotation: Rotation) -> Rotation:
    """R^T: ``rotate(w, transposed(r))`` is the row ``w^T R``, so that a weight whose rows are turned by it is ``W R``."""
    return Rotation(rotation.direct, -swap_unsigned(rotation.cross, rotation.group_size), rotation.group_size)


def partner_columns(group_size: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """For each output its partner, int64, and the sign J gives it (-1 first members, 1 second), in like's dtype.

    group_size: one for all, or a tensor that broadcasts with like ``[..., D]``; both results have like's shape.
    """
    column = torch.arange(like.shape[-1], device=like.device)
    is_first = column % group_size < group_size // 2
    half = group_size // 2
    partner = torch.where(is_first, column + half, column - half)
    sign = 1 - 2 * is_first.to(like.dtype)
    return partner.expand(like.shape), sign.expand(like.shape)


def determinant(rotation: Rotation) -> Tensor:
    """Determinant of each pair's block, given to both members: ``[..., D]``."""
    direct, cross, size = rotation.direct, rotation.cross, rotation.group_size
    return direct * swap_unsigned(direct, size) + cross * swap_unsigned(cross, size)


def inverse(rotation: Rotation) -> Rotation:
    """The rotation that undoes `rotation`, in closed form; raises `AdapterError` where a block is singular."""
    det = determinant(rotation)
    singular = ~(torch.isfinite(det) & (det != 0))
    if bool(singular.any()):
        where = int(singular.nonzero()[0, -1])
        raise AdapterError(
            f"got a singular or non-finite block (element {where}, determinant {float(det[singular][0]):g}); an inverse "
            "needs every determinant to be finite and not 0; an adapter with alpha = 0 cannot be undone"
        )
    direct = swap_unsigned(rotation.direct, rotation.group_size) / det
    return Rotation(direct, -rotation.cross / det, rotation.group_size)


def to_blocks(rotation: Rotation) -> Tensor:
    """The 2 x 2 blocks, ``[..., P, 2, 2]``, in the order of the pairs' first members."""
    d1, d2 = (v.flatten(-2) for v in _halves(rotation.direct, rotation.group_size))
    c1, c2 = (v.flatten(-2) for v in _halves(rotation.cross, rotation.group_size))
    return torch.stack((torch.stack((d1, -c1), -1), torch.stack((c2, d2), -1)), -2)


def to_dense(rotation: Rotation) -> Tensor:
    """R itself, ``[..., D, D]``: for tests and for looking at; nothing in roadie computes with it."""
    eye = torch.eye(rotation.out_features, dtype=rotation.direct.dtype, device=rotation.direct.device)
    columns = rotation.direct.unsqueeze(-2) * eye + rotation.cross.unsqueeze(-2) * swap(eye, rotation.group_size)
    return columns.mT


def shard(rotation: Rotation, rank: int, world_size: int) -> Rotation:
    """The part of a rotation that belongs to `rank` of `world_size` equal slices of the outputs (tensor parallelism).

    Raises `ConfigError` unless each slice holds whole groups.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"got rank {rank} of {world_size}; wanted 0 <= rank < world_size")
    width, rest = divmod(rotation.out_features, world_size)
    if rest or width % rotation.group_size:
        raise ConfigError(
            f"got out_features={rotation.out_features} over {world_size} shards with group_size={rotation.group_size}; "
            "every shard must hold whole groups; use a group_size that divides out_features / world_size"
        )
    part = slice(rank * width, (rank + 1) * width)
    return Rotation(rotation.direct[..., part], rotation.cross[..., part], rotation.group_size)


def _check_out_features(width: int, rotation: Rotation) -> None:
    if width != rotation.out_features:
        raise AdapterError(
            f"got {width} elements for a rotation of {rotation.out_features}; wanted equal sizes of the last dimension"
        )


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32
