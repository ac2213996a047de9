"""Adapters' parameters on their way into a bank: the rotations of all layers of all of them in a handful of operations.

An adapter has a hundred layers and more, and each of them is small: made one by one, their rotations cost what hundreds of
small tensor operations cost. Layers of one kind are made as one long layer, which their groups allow: none crosses a border. Each
stage of their chains is made so.

Legend: D out features of a layer, K adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from roadie.adapter import LayerParameters
from roadie.bank.families import Family
from roadie.errors import AdapterError
from roadie.rotation import Rotation, Variant, chain_from_parameters, from_parameters, split_stages

Kind = tuple[Variant, tuple[int, ...], torch.dtype, torch.dtype, torch.device, torch.device]
Layers = Mapping[str, LayerParameters]


@dataclass(frozen=True, eq=False)
class SiteChains:
    """Chains of rotations ``[K, D]`` at one site, and which adapters they belong to."""

    of: tuple[int, ...]
    rotations: tuple[Rotation, ...]


@dataclass(frozen=True, eq=False)
class ReadyAdapter:
    """An adapter that fits a bank, its rotations made: what `AdapterBank.prepare` gives, and `admit` and `replace` take."""

    bank: object
    layers: Mapping[str, Sequence[SiteChains]]


def rotations(
    adapters: Mapping[str, Layers], dtype: torch.dtype, device_of: Callable[[str], torch.device]
) -> dict[str, list[SiteChains]]:
    """Layer path -> the rotations of the adapters that have it, in `dtype`, on the device that `device_of` names for the path.

    Raises `AdapterError` where one is not finite in `dtype`.
    """
    made: dict[str, list[SiteChains]] = {}
    for kind, members in _by_kind(list(adapters.values()), device_of).items():
        layers = [[list(adapters.values())[index][path] for index in of] for path, of in members.items()]
        stages = _whole(kind, [layer for of_path in layers for layer in of_path], dtype)
        shapes = [(len(of_path), of_path[0].out_features) for of_path in layers]
        parts = [_split(stage, shapes) for stage in stages]
        for path, *chain in zip(members, *parts, strict=True):
            made.setdefault(path, []).append(SiteChains(tuple(members[path]), tuple(chain)))
        if not all(_are_finite(stage.direct, stage.cross) for stage in stages):
            _refuse(list(adapters), {path: made[path][-1] for path in members}, dtype)
    return made


def rotations_of_row(family: Family, name: str) -> dict[str, list[SiteChains]]:
    """As `rotations`, of one adapter in training, whose layers of one kind are stacked already; in float32, where it trains."""
    made: dict[str, list[SiteChains]] = {}
    for stack, row in zip(family.stacks, family.row(name), strict=True):
        theta, alpha = row.unbind(1)
        chain = chain_from_parameters(theta, alpha, stack.variant, stack.stages)
        if not all(_are_finite(rotation.direct, rotation.cross) for rotation in chain):
            raise AdapterError(f"got adapter {name!r} with values that are not finite; wanted finite ones")
        vectors = [(r.direct.unsqueeze(1).unbind(), r.cross.unsqueeze(1).unbind(), r.group_size) for r in chain]
        for layer, path in enumerate(stack.paths):
            of_layer = tuple(Rotation(direct[layer], cross[layer], size) for direct, cross, size in vectors)
            made[path] = [SiteChains((0,), of_layer)]
    return made


def _by_kind(adapters: Sequence[Layers], device_of: Callable[[str], torch.device]) -> dict[Kind, dict[str, list[int]]]:
    """Kind -> layer path -> the adapters that have such a layer there."""
    kinds: dict[Kind, dict[str, list[int]]] = {}
    for index, layers in enumerate(adapters):
        for path, layer in layers.items():
            theta = layer.theta
            kind = (layer.variant, layer.stages, theta.dtype, layer.alpha.dtype, theta.device, device_of(path))
            kinds.setdefault(kind, {}).setdefault(path, []).append(index)
    return kinds


def _whole(kind: Kind, layers: Sequence[LayerParameters], dtype: torch.dtype) -> list[Rotation]:
    """The chains of layers of one kind: of each stage all of them, end to end."""
    variant, stages, *_, device = kind
    with torch.no_grad():
        thetas, alphas = (_by_stage(v, len(stages)) for v in ([x.theta for x in layers], [x.alpha for x in layers]))
        whole = map(from_parameters, thetas, alphas, repeat(variant), stages)
        return [Rotation(r.direct.to(device, dtype), r.cross.to(device, dtype), r.group_size) for r in whole]


def _by_stage(stored: Sequence[Tensor], num_stages: int) -> list[Tensor]:
    """For each stage the parameters of all layers, end to end."""
    parts = (split_stages(vector, num_stages) for vector in stored)
    return [torch.cat(of_stage) for of_stage in zip(*parts, strict=True)]


def _split(whole: Rotation, shapes: Sequence[tuple[int, int]]) -> list[Rotation]:
    sizes = [rows * width for rows, width in shapes]
    parts = zip(whole.direct.split(sizes), whole.cross.split(sizes), shapes, strict=True)
    return [Rotation(direct.view(shape), cross.view(shape), whole.group_size) for direct, cross, shape in parts]


def _are_finite(direct: Tensor, cross: Tensor) -> bool:
    # A NaN is both ends; 20 times as fast as isfinite.
    ends = [end for vector in (direct, cross) for end in vector.aminmax()]
    return all(math.isfinite(float(end)) for end in ends)


def _refuse(names: Sequence[str], of_paths: Mapping[str, SiteChains], dtype: torch.dtype) -> None:
    for path, chains in of_paths.items():
        for row, index in enumerate(chains.of):
            if not all(_are_finite(rotation.direct[row], rotation.cross[row]) for rotation in chains.rotations):
                raise AdapterError(
                    f"got adapter {names[index]!r} with values that are not finite (in {dtype}) in {path!r}; wanted finite ones"
                )
