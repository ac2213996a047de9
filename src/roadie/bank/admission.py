"""Adapters' parameters on their way into a bank: the rotations of all layers of all of them in a handful of operations.

An adapter has a hundred layers and more, and each of them is small: made one by one, their rotations cost what hundreds of
small tensor operations cost. Layers of one kind are made as one long layer, which their groups allow: none crosses a border.

Legend: D out features of a layer, K adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.adapter import LayerParameters
from roadie.errors import AdapterError
from roadie.rotation import Rotation, Variant, from_parameters

Kind = tuple[Variant, int, torch.dtype, torch.dtype, torch.device, torch.device]
Layers = Mapping[str, LayerParameters]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rotations ``[K, D]`` of one layer, and which of the adapters that are admitted together they belong to."""

    of: tuple[int, ...]
    rotation: Rotation


def rotations(
    adapters: Mapping[str, Layers], dtype: torch.dtype, device_of: Callable[[str], torch.device]
) -> dict[str, list[Rows]]:
    """Layer path -> the rotations of the adapters that have it, in `dtype`, on the device that `device_of` names for the path.

    Raises `AdapterError` where one is not finite in `dtype`.
    """
    made: dict[str, list[Rows]] = {}
    for kind, members in _by_kind(list(adapters.values()), device_of).items():
        layers = [[list(adapters.values())[index][path] for index in of] for path, of in members.items()]
        direct, cross = _whole(kind, [layer for of_path in layers for layer in of_path], dtype)
        shapes = [(len(of_path), of_path[0].out_features) for of_path in layers]
        for path, *rows in zip(members, _split(direct, shapes), _split(cross, shapes), strict=True):
            made.setdefault(path, []).append(Rows(tuple(members[path]), Rotation(rows[0], rows[1], kind[1])))
        if not _are_finite(direct, cross):
            _refuse(list(adapters), {path: made[path][-1] for path in members}, dtype)
    return made


def _by_kind(adapters: Sequence[Layers], device_of: Callable[[str], torch.device]) -> dict[Kind, dict[str, list[int]]]:
    """Kind -> layer path -> the adapters that have such a layer there."""
    kinds: dict[Kind, dict[str, list[int]]] = {}
    for index, layers in enumerate(adapters):
        for path, layer in layers.items():
            theta = layer.theta
            kind = (layer.variant, layer.group_size, theta.dtype, layer.alpha.dtype, theta.device, device_of(path))
            kinds.setdefault(kind, {}).setdefault(path, []).append(index)
    return kinds


def _whole(kind: Kind, layers: Sequence[LayerParameters], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """direct and cross of layers of one kind, end to end."""
    variant, group_size, *_, device = kind
    with torch.no_grad():
        theta, alpha = (torch.cat(parts) for parts in ([x.theta for x in layers], [x.alpha for x in layers]))
        whole = from_parameters(theta, alpha, variant, group_size)
        return whole.direct.to(device, dtype), whole.cross.to(device, dtype)


def _split(vector: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = vector.split([rows * width for rows, width in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _are_finite(direct: Tensor, cross: Tensor) -> bool:
    ends = [
        end for vector in (direct, cross) for end in vector.aminmax()
    ]  # a NaN is both; 20 times as fast as isfinite
    return all(math.isfinite(float(end)) for end in ends)


def _refuse(names: Sequence[str], of_paths: Mapping[str, Rows], dtype: torch.dtype) -> None:
    for path, rows in of_paths.items():
        for index, direct, cross in zip(rows.of, rows.rotation.direct, rows.rotation.cross, strict=True):
            if not _are_finite(direct, cross):
                raise AdapterError(
                    f"got adapter {names[index]!r} with values that are not finite (in {dtype}) in {path!r}; wanted finite ones"
                )
