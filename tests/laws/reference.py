"""R written out from the paper's formulas, entry by entry: the truth that everything else is measured against.

It shares no code with `roadie.rotation`: pairs, parameters and signs are worked out again, in loops over plain integers, in
float64, as dense matrices. Slow, meant to be read.

A pair (i, k) of a group has the block  [ a11 cos t11  -a12 sin t12 ]    row i
                                        [ a21 sin t21   a22 cos t22 ]    row k
(Liao & Monz 2024, arXiv 2409.00119); what differs between the variants is which parameter stands where.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roadie.rotation import Rotation


def pairs(out_features: int, group_size: int) -> Iterator[tuple[int, int]]:
    """The pairs (i, k) of outputs: inside a group of G, the j-th and the (j + G/2)-th."""
    for start in range(0, out_features, group_size):
        for j in range(group_size // 2):
            yield start + j, start + j + group_size // 2


def places(variant: str, group_size: int, first: int, second: int) -> tuple[int, int, int, int]:
    """Where the parameters of a pair stand in the stored theta and alpha: those of a11, a12, a21, a22."""
    group, j = divmod(first, group_size)
    if variant == "road_1":  # [D/G, G/2]: one a pair
        place = group * (group_size // 2) + j
        return place, place, place, place
    if variant == "road_2":  # [D]: one a row
        return first, first, second, second
    start = group * 2 * group_size  # [D/G, 2, G]: G for the cosines of a group's rows, then G for the sines
    upper, lower = start + j, start + j + group_size // 2
    return upper, upper + group_size, lower + group_size, lower


def dense_rotation(theta: Tensor, alpha: Tensor, variant: str, group_size: int) -> Tensor:
    """R of stored parameters ``[n]``: ``[D, D]`` in float64, differentiable in theta and alpha."""
    theta, alpha = theta.double(), alpha.double()
    cosines, sines = alpha * torch.cos(theta), alpha * torch.sin(theta)
    out_features = {"road_1": 2 * len(theta), "road_2": len(theta), "road_4": len(theta) // 2}[variant]
    rows, columns, values = [], [], []
    for i, k in pairs(out_features, group_size):
        p11, p12, p21, p22 = places(variant, group_size, i, k)
        rows += [i, i, k, k]
        columns += [i, k, i, k]
        values += [(cosines, p11, 1), (sines, p12, -1), (sines, p21, 1), (cosines, p22, 1)]
    entries = torch.stack([sign * source[place] for source, place, sign in values])
    return _matrix(out_features, rows, columns, entries)


def dense(rotation: Rotation) -> Tensor:
    """R of a `Rotation` of one adapter, direct and cross ``[D]``: ``[D, D]`` in float64."""
    direct, cross = rotation.direct.double(), rotation.cross.double()
    rows, columns, entries = [], [], []
    for i, k in pairs(len(direct), rotation.group_size):
        rows += [i, i, k, k]
        columns += [i, k, i, k]
        entries += [direct[i], -cross[i], cross[k], direct[k]]
    return _matrix(len(direct), rows, columns, torch.stack(entries))


def _matrix(size: int, rows: list[int], columns: list[int], entries: Tensor) -> Tensor:
    empty = torch.zeros(size, size, dtype=torch.float64)
    return empty.index_put((torch.tensor(rows), torch.tensor(columns)), entries)
