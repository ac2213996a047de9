"""One adapter in numbers: what it does to each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from roadie.adapter import Adapter
from roadie.inspect.blocks import Blocks, blocks_of
from roadie.inspect.positions import Position, positions_of


@dataclass(frozen=True)
class LayerPortrait:
    """What an adapter does to one layer; the measures are those of `roadie.inspect.blocks`.

    angle_degrees: root mean square over the blocks that are not mirrored, None where all are.
    log_scale, log_scale_spread: mean and standard deviation of ln(scale) over the blocks that are not zero, None if all are.
    change: ||R - I||_F / sqrt(D), the relative change of an output of no preferred direction.
    beyond_road_1: the share of change^2 that no road_1 adapter expresses. mirrored: blocks of negative determinant.
    """

    path: str
    depth: int | None
    kind: str
    variant: str
    group_size: int
    out_features: int
    parameters: int
    angle_degrees: float | None
    log_scale: float | None
    log_scale_spread: float | None
    change: float
    beyond_road_1: float
    mirrored: int


@dataclass(frozen=True)
class Portrait:
    """What an adapter does, in every layer and altogether (means over all outputs); no model is needed.

    num_bytes: of all tensors; other_tensors: those that are no rotations (modules_to_save, trained biases), which are
    counted in num_bytes and in nothing else.
    """

    name: str
    base_model: str | None
    variants: tuple[str, ...]
    group_sizes: tuple[int, ...]
    parameters: int
    num_bytes: int
    other_tensors: int
    outputs: int
    angle_degrees: float | None
    log_scale: float | None
    change: float
    beyond_road_1: float
    mirrored: int
    layers: tuple[LayerPortrait, ...]

    @property
    def most_changed(self) -> tuple[LayerPortrait, ...]:
        """The layers, the most changed one first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.change))


def look(adapter: Adapter, name: str = "adapter", positions: Mapping[str, Position] | None = None) -> Portrait:
    """What `adapter` does; `name` is what the portrait and errors call it.

    positions: of the layers, where several adapters are to agree on the names of kinds; None: by this adapter alone.
    Raises `AdapterError`, naming adapter and layer, where parameters are not finite.
    """
    blocks = blocks_of(adapter, name)
    positions = positions or positions_of(adapter.layers)
    columns = _measures(blocks, blocks.starts)
    layers = tuple(
        LayerPortrait(
            path=path,
            depth=positions[path].depth,
            kind=positions[path].kind,
            variant=layer.variant.value,
            group_size=layer.group_size,
            out_features=layer.out_features,
            parameters=layer.num_parameters,
            **{key: values[number] for key, values in columns.items()},
        )
        for number, (path, layer) in enumerate(adapter.layers.items())
    )
    whole = {key: values[0] for key, values in _measures(blocks, np.array([0])).items() if key != "log_scale_spread"}
    return Portrait(
        name=name,
        base_model=adapter.base_model_name,
        variants=tuple(variant.value for variant in adapter.variants),
        group_sizes=adapter.group_sizes,
        parameters=adapter.num_parameters,
        num_bytes=adapter.nbytes,
        other_tensors=len(adapter.other),
        outputs=sum(adapter.out_features.values()),
        layers=layers,
        **whole,
    )


def _measures(blocks: Blocks, starts: Any) -> dict[str, list[Any]]:
    """The measures of each stretch of blocks that begins at one of `starts`, by name."""
    mirrored, scale = blocks.is_mirrored, blocks.scale
    there = scale > 0
    log_scale = np.log(np.where(there, scale, 1.0))
    count: Any = np.diff(np.append(starts, len(scale)))
    turned, stretched = np.add.reduceat(~mirrored, starts, dtype=int), np.add.reduceat(there, starts, dtype=int)
    squared_angle = np.add.reduceat(np.where(mirrored, 0.0, blocks.angle**2), starts)
    mean = _over(np.add.reduceat(log_scale, starts), stretched)
    change = np.add.reduceat(blocks.squared_change, starts)
    beyond = np.add.reduceat(np.abs(blocks.mirroring) ** 2, starts)
    centred = np.where(there, log_scale - np.repeat(np.nan_to_num(mean), count), 0.0)
    spread = np.sqrt(_over(np.add.reduceat(centred**2, starts), stretched))
    return {
        "angle_degrees": _known(np.degrees(np.sqrt(_over(squared_angle, turned)))),
        "log_scale": _known(mean),
        "log_scale_spread": _known(spread),
        "change": np.sqrt(change / count).tolist(),
        "beyond_road_1": np.divide(beyond, change, out=np.zeros_like(change), where=change > 0).tolist(),
        "mirrored": (count - turned).tolist(),
    }


def _over(sums: Any, counts: Any) -> Any:
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _known(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
