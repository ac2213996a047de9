"""What an adapter file holds, in numbers; needs torch, but neither a model nor transformers nor PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters, is_input, layer_of
from roadie.rotation import Rotation


@dataclass(frozen=True)
class Range:
    """The smallest and the largest of some values."""

    least: float
    most: float


@dataclass(frozen=True)
class KindSummary:
    """The layers that share the last part of their name ("q_proj", or "q_proj.road_input" for rotations of their inputs): how
    many, their sizes, and what R does to them.

    angle_degrees and scale are those of R itself, for every output: atan2(cross, direct) and hypot(cross, direct); no
    change is 0 and 1.
    """

    name: str
    layers: int
    out_features: tuple[int, ...]
    variants: tuple[str, ...]
    group_sizes: tuple[int, ...]
    parameters: int
    angle_degrees: Range
    scale: Range


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter in numbers: parameters are those of RoAd, `other` the tensors saved along with them.

    num_bytes: of all tensors; file_bytes: of the weights file; targets: as configured; extras: settings beyond those of
    stock PEFT; config: everything adapter_config.json says.
    """

    path: str
    base_model: str | None
    variants: tuple[str, ...]
    group_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    layers: int
    parameters: int
    num_bytes: int
    file_bytes: int
    angle_degrees: Range
    scale: Range
    modules_to_save: tuple[str, ...]
    other: tuple[tuple[str, tuple[int, ...]], ...]
    targets: tuple[str, ...]
    extras: dict[str, Any]
    config: dict[str, Any]
    kinds: tuple[KindSummary, ...]


def summarise(path: str | Path) -> AdapterSummary:
    """The summary of the adapter in the folder `path`; raises `CheckpointError` where it cannot be read."""
    folder = Path(path)
    adapter = checkpoint.load(folder)
    layers = list(adapter.layers.values())
    angle, scale = _ranges(layers)
    return AdapterSummary(
        path=str(path),
        base_model=adapter.base_model_name,
        variants=tuple(variant.value for variant in adapter.variants),
        group_sizes=adapter.group_sizes,
        dtypes=_dtypes(layers),
        layers=len(layers),
        parameters=adapter.num_parameters,
        num_bytes=adapter.nbytes,
        file_bytes=checkpoint.locate_weights(folder).stat().st_size,
        angle_degrees=angle,
        scale=scale,
        modules_to_save=tuple(adapter.config.get("modules_to_save") or ()),
        other=tuple((name, tuple(tensor.shape)) for name, tensor in sorted(adapter.other.items())),
        targets=_targets(adapter.config.get("target_modules")),
        extras={
            key: value
            for key, value in sorted(adapter.config.items())
            if checkpoint.EXTRA_DEFAULTS.get(key, value) != value
        },
        config=dict(sorted(adapter.config.items())),
        kinds=_kinds(adapter),
    )


def _targets(targets: object) -> tuple[str, ...]:
    return (
        (targets,)
        if isinstance(targets, str)
        else tuple(map(str, targets))
        if isinstance(targets, (list, tuple))
        else ()
    )


def _kinds(adapter: Adapter) -> tuple[KindSummary, ...]:
    kinds: dict[str, list[LayerParameters]] = {}
    for path, layer in adapter.layers.items():
        name = layer_of(path).rpartition(".")[2]
        kinds.setdefault(f"{name}{INPUT_SUFFIX}" if is_input(path) else name, []).append(layer)
    return tuple(_kind(name, layers) for name, layers in sorted(kinds.items()))


def _kind(name: str, layers: Sequence[LayerParameters]) -> KindSummary:
    angle, scale = _ranges(layers)
    return KindSummary(
        name=name,
        layers=len(layers),
        out_features=tuple(sorted({layer.out_features for layer in layers})),
        variants=tuple(sorted({layer.variant.value for layer in layers})),
        group_sizes=tuple(sorted({size for layer in layers for size in layer.stages})),
        parameters=sum(layer.num_parameters for layer in layers),
        angle_degrees=angle,
        scale=scale,
    )


def _dtypes(layers: Sequence[LayerParameters]) -> tuple[str, ...]:
    return tuple(sorted({str(layer.theta.dtype).removeprefix("torch.") for layer in layers}))


def _ranges(layers: Sequence[LayerParameters]) -> tuple[Range, Range]:
    rotations = [rotation for layer in layers for rotation in layer.rotations]
    angles = [math.degrees(value) for rotation in rotations for value in _extremes(_angle(rotation))]
    scales = [value for rotation in rotations for value in _extremes(torch.hypot(rotation.cross, rotation.direct))]
    return Range(min(angles), max(angles)), Range(min(scales), max(scales))


def _angle(rotation: Rotation) -> torch.Tensor:
    # + 0.0 makes -0.0 positive, so that half a turn is always +180 degrees.
    return torch.atan2(rotation.cross + 0.0, rotation.direct)


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    least, most = torch.aminmax(values)
    return float(least), float(most)
