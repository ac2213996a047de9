"""The best 2 x 2 block of each pair of outputs, in closed form: least squares over the two rows.

A pair has two rows of numbers h1, h2 as they were (rows of a weight matrix with the bias behind them, or two outputs over the
tokens of a text) and e1, e2, what is to be added to them. Wanted is the block B = I + D that makes ``|(h + e) - B h|`` least:

    G = [h1 h2 e1 e2]^T [h1 h2 e1 e2]      second moments, 4 x 4 a pair: all that is kept of the rows; sums over columns
    A = [h h], C = [e h]                   2 x 2 parts of G

    road_2, road_4    D = C A^-1           every 2 x 2 block; the two rows of D do not know of each other
    road_1            D = x I + y J        x = tr C / tr A, y = (C21 - C12) / tr A: the complex number sum(conj(h) e) / sum |h|^2

D is computed from the change e, not from h + e, so that nothing cancels where the change is small. The rows are first scaled
to length 1: A becomes [[1, r], [r, 1]], with eigenvalues 1 + r and 1 - r. One that is no larger than the rounding of r is taken
as infinite (the pseudo-inverse: least change among the best), and so is the length of a row of zeros: where nothing can be
known, D is 0. `ridge` is added to both eigenvalues: it prefers small D where rows are nearly parallel.

Shapes: ``D`` outputs, ``P = D/2`` pairs, ``n`` columns. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.rotation import Rotation, Variant, check_group_size, to_blocks

TILE_ELEMENTS = 2**19
"""Elements of one tensor that are looked at at once: 4 MiB in float64, six times that with what is computed of them."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the rows of every pair.

    gram: ``[P, 4, 4]``, float64, of (h1, h2, e1, e2), pairs in the order of `rotation.to_blocks`; columns: how many numbers
    each row has; group_size: the pairing.
    """

    gram: Tensor
    columns: int
    group_size: int

    def __add__(self, other: Moments) -> Moments:
        """Of the columns of both."""
        assert self.group_size == other.group_size
        return Moments(self.gram + other.gram, self.columns + other.columns, self.group_size)

    @property
    def is_finite(self) -> bool:
        """Whether all rows are finite, and not so large that their squares are not."""
        return bool(torch.isfinite(self.gram).all())

    @property
    def squared_norm(self) -> float:
        """``|h|^2`` over all pairs."""
        return float(self.gram.diagonal(dim1=-2, dim2=-1)[:, :2].sum())

    @property
    def squared_change(self) -> float:
        """``|e|^2`` over all pairs."""
        return float(self.gram.diagonal(dim1=-2, dim2=-1)[:, 2:].sum())

    def squared_error(self, rotation: Rotation) -> float:
        """``|(h + e) - R h|^2`` over all pairs; rotation: ``[D]``."""
        eye = torch.eye(2, dtype=torch.float64, device=self.gram.device)
        change = to_blocks(rotation).double() - eye
        left = torch.cat((-change, eye.expand_as(change)), dim=-1)  # [-D I] (h, e) = e - D h
        return max(0.0, float(((left @ self.gram) * left).sum()))


def moments(before: Tensor, after: Tensor, group_size: int) -> Moments:
    """Moments of rows h = `before` and e = `after` - `before`, ``[D, n]`` each, of any floating dtypes.

    Raises `ConfigError` where `group_size` does not divide D.
    """
    return moments_of_tiles(tiles_between(before, after, group_size), len(before), group_size, before.device)


Tile = tuple[slice, Tensor, Tensor]
"""Which outputs (whole groups), and their h and e ``[rows, columns]`` in float64, for some of the columns."""


def moments_of_tiles(tiles: Iterator[Tile], outputs: int, group_size: int, device: torch.device) -> Moments:
    """Moments of rows that come in tiles: each output with the same number of columns, in any order."""
    check_group_size(group_size, outputs)
    gram = torch.zeros(outputs // 2, 4, 4, dtype=torch.float64, device=device)
    elements = 0
    for where, rows, change in tiles:
        stacked = torch.cat((_by_pair(rows, group_size), _by_pair(change, group_size)), dim=1)
        gram[where.start // 2 : where.stop // 2] += stacked @ stacked.mT
        elements += rows.numel()
    return Moments(gram, elements // outputs, group_size)


def tiling(outputs: int, columns: int, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Outputs (whole groups) and columns, so that each element is in one tile of about `TILE_ELEMENTS` or less."""
    width = max(1, min(columns, TILE_ELEMENTS // group_size))
    height = max(1, TILE_ELEMENTS // (group_size * width)) * group_size
    for top in range(0, outputs, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, outputs)), slice(left, min(left + width, columns))


def tiles_between(before: Tensor, after: Tensor, group_size: int) -> Iterator[Tile]:
    """`before` and what is to be added to it, a tile in float64 at a time."""
    for where, columns in tiling(before.shape[0], before.shape[1], group_size):
        rows = before[where, columns].double()
        yield where, rows, after[where, columns].double() - rows


def _by_pair(rows: Tensor, group_size: int) -> Tensor:
    """[rows, n] -> [pairs, 2, n]"""
    return rows.unflatten(0, (-1, 2, group_size // 2)).transpose(1, 2).flatten(0, 1)


def best_rotation(moments: Moments, variant: str | Variant, ridge: float = 0.0) -> Rotation:
    """The rotation of this variant that explains most of the change; ``[D]``, float64."""
    rows, product = moments.gram[:, :2, :2], moments.gram[:, 2:, :2]
    if Variant.parse(variant) is Variant.ROAD_1:
        change = _best_scaled_turn(rows, product, ridge)
    else:
        change = _best_block(rows, product, ridge, _rounding(moments.columns))
    return _rotation(change, moments.group_size)


def _best_scaled_turn(rows: Tensor, product: Tensor, ridge: float) -> Tensor:
    """x I + y J for each pair, ``[P, 2, 2]``."""
    squares = (rows[:, 0, 0] + rows[:, 1, 1]) * (1 + ridge)
    inverse = torch.where(squares > 0, 1 / squares, 0)
    x = (product[:, 0, 0] + product[:, 1, 1]) * inverse
    y = (product[:, 1, 0] - product[:, 0, 1]) * inverse
    return torch.stack((torch.stack((x, -y), -1), torch.stack((y, x), -1)), -2)


def _best_block(rows: Tensor, product: Tensor, ridge: float, rounding: float) -> Tensor:
    """C A^-1 for each pair, ``[P, 2, 2]``."""
    lengths = rows.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    cosine = (rows[:, 0, 1] * scale[:, 0] * scale[:, 1]).clamp(-1, 1)
    along, across = (torch.where(value > rounding, 1 / (value + ridge), 0) for value in (1 + cosine, 1 - cosine))
    equal, mixed = (along + across) / 2, (along - across) / 2
    inverse = torch.stack((torch.stack((equal, mixed), -1), torch.stack((mixed, equal), -1)), -2)
    return (product * scale[:, None]) @ inverse * scale[:, None]


def _rounding(columns: int) -> float:
    """How wrong the cosine of two rows can be: a sum of n products, two lengths and two divisions."""
    return (columns + 4) * torch.finfo(torch.float64).eps


def _rotation(change: Tensor, group_size: int) -> Rotation:
    """I + D as a rotation; change: ``[P, 2, 2]``."""
    direct = 1 + torch.stack((change[:, 0, 0], change[:, 1, 1]))
    cross = torch.stack((-change[:, 0, 1], change[:, 1, 0]))
    return Rotation(_by_output(direct, group_size), _by_output(cross, group_size), group_size)


def _by_output(members: Tensor, group_size: int) -> Tensor:
    """[2, P] -> [D]: first and second members to their places."""
    return members.unflatten(1, (-1, group_size // 2)).transpose(0, 1).flatten()
