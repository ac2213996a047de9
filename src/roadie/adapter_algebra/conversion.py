"""From one variant or group size to another: exactly where that is possible, with a report where it is not.

    road_1 -> road_2 -> road_4    the same parameters, more often; bit for bit
    road_4 -> road_2              a row's direct and cross have one angle and one alpha: always possible, rounded to the dtype,
                                  and bit for bit where road_4 has the same angle and alpha for both
    road_2, road_4 -> road_1      bit for bit where the rows of each pair agree; else the nearest scaled rotation of each block,
                                  ``[[a, b], [c, d]] -> x I + y J``, x = (a + d) / 2, y = (c - b) / 2 (least squares)
    another group size            only where nothing turns (cross = 0): two sizes share no pair of outputs

Parameters that are carried over keep their dtype; computed ones are float32, or float64 where they come from float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roadie.adapter import Adapter, LayerParameters, refuse_chains
from roadie.adapter_algebra.layers import about_layer, grouped_config, in_float64, rows_agree, stored
from roadie.algebra import Metric, squared_distance
from roadie.algebra.powers import identity_like
from roadie.errors import ConfigError
from roadie.rotation import Rotation, Variant, check_group_size, determinant, swap_unsigned


@dataclass(frozen=True)
class LayerLoss:
    """What a layer lost, before rounding.

    lost, change: the squares of ``|R - Q|`` (R before, Q after) and ``|R - I|``, Frobenius norms; outputs: D; mirrored: pairs
    whose block has a negative determinant, which no scaled rotation has.
    """

    lost: float
    change: float
    outputs: int
    mirrored: int

    @property
    def share(self) -> float:
        """lost over change: 0 nothing, 1 as much as there was."""
        return self.lost / self.change if self.change else 0.0


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted adapter, and what each layer lost by it (module path -> `LayerLoss`)."""

    adapter: Adapter
    losses: Mapping[str, LayerLoss]

    @property
    def is_exact(self) -> bool:
        """Whether nothing was lost but rounding."""
        return all(loss.lost == 0 for loss in self.losses.values())

    @property
    def distance(self) -> float:
        """The chordal distance of what it was and what it is, before rounding; see `roadie.distance`."""
        lost = math.fsum(loss.lost for loss in self.losses.values())
        return math.sqrt(lost / sum(loss.outputs for loss in self.losses.values()))

    @property
    def share_lost(self) -> float:
        """The part of the adapter's change, in squares, that is lost: 0 nothing, 1 as much as there was."""
        change = math.fsum(loss.change for loss in self.losses.values())
        return math.fsum(loss.lost for loss in self.losses.values()) / change if change else 0.0


def convert(adapter: Adapter, variant: str | Variant | None = None, *, group_size: int | None = None) -> Conversion:
    """`adapter` as `variant` and with `group_size` in every layer (None: as they are), and what was lost.

    Other tensors and settings are kept. With another group size a variant that cannot hold the result becomes road_2, unless
    one is asked for. Raises `ConfigError`, naming the layer, for a group size that does not fit or in which the adapter does
    not turn, and `AdapterError` where parameters are not finite, or a chain has several stages.
    """
    refuse_chains(adapter, "convert")
    regrouped = {path: _regrouped(path, layer, group_size) for path, layer in adapter.layers.items()}
    wanted = _variant(adapter, regrouped) if variant is None else Variant.parse(variant)
    found = {}
    for path, layer in regrouped.items():
        with about_layer(path):
            found[path] = _converted(layer, wanted or layer.variant)
    layers = {path: layer for path, (layer, _) in found.items()}
    losses = {path: loss for path, (_, loss) in found.items()}
    return Conversion(Adapter(layers, _config(adapter, layers, wanted), adapter.other), losses)


def _variant(adapter: Adapter, layers: Mapping[str, LayerParameters]) -> Variant | None:
    """The variant of all layers where none is asked for; None: each keeps its own."""
    if all(layer is adapter.layers[path] for path, layer in layers.items()):
        return None
    all_agree = all(rows_agree(in_float64("the adapter", layer)) for layer in layers.values())
    return Variant.ROAD_1 if all_agree and adapter.variants == (Variant.ROAD_1,) else Variant.ROAD_2


def _regrouped(path: str, layer: LayerParameters, group_size: int | None) -> LayerParameters:
    """The layer in another group size, as road_2: theta = 0, alpha = direct; itself where it has that size."""
    with about_layer(path):
        rotation = in_float64("the adapter", layer)
        if group_size in (None, layer.group_size):
            return layer
        check_group_size(group_size, layer.out_features)
        _check_does_not_turn(rotation, group_size)
    alpha = rotation.direct.to(_computed_dtype(layer))
    return LayerParameters(torch.zeros_like(alpha), alpha, Variant.ROAD_2, group_size)


def _check_does_not_turn(rotation: Rotation, group_size: int) -> None:
    if bool(rotation.cross.any()):
        raise ConfigError(
            f"got group_size={group_size} for an adapter that turns pairs of group_size={rotation.group_size}; two sizes share "
            "no pair of outputs, so that only where cross = 0 everywhere can it change; keep the size, or train another adapter"
        )


def _converted(layer: LayerParameters, variant: Variant) -> tuple[LayerParameters, LayerLoss]:
    if layer.variant is variant:
        return layer, _loss(layer, None)
    by_row = _as_road_2(layer)
    if variant is Variant.ROAD_2:
        return by_row, _loss(layer, None)
    if variant is Variant.ROAD_4:
        return _repeated(by_row, layer.group_size, variant), _loss(layer, None)
    by_pair = _halved(by_row, layer.group_size // 2, variant)
    if by_pair is not None:
        return by_pair, _loss(layer, None)
    nearest = nearest_scaled_rotation(in_float64("the adapter", layer))
    return stored(nearest, variant, _computed_dtype(layer)), _loss(layer, nearest)


def _as_road_2(layer: LayerParameters) -> LayerParameters:
    """The same rotation with one theta and one alpha a row."""
    if layer.variant is Variant.ROAD_2:
        return layer
    if layer.variant is Variant.ROAD_1:
        return _repeated(layer, layer.group_size // 2, Variant.ROAD_2)
    by_row = _halved(layer, layer.group_size, Variant.ROAD_2)
    return by_row or stored(in_float64("the adapter", layer), Variant.ROAD_2, _computed_dtype(layer))


def _repeated(layer: LayerParameters, count: int, variant: Variant) -> LayerParameters:
    """`layer` with each run of `count` parameters twice, one run after the other."""

    def twice(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, count).expand(-1, 2, -1).flatten()

    return LayerParameters(twice(layer.theta), twice(layer.alpha), variant, layer.group_size)


def _halved(layer: LayerParameters, count: int, variant: Variant) -> LayerParameters | None:
    """The inverse of `_repeated`; None where the runs of a pair are not equal."""
    theta, alpha = (values.reshape(-1, 2, count) for values in (layer.theta, layer.alpha))
    if not all(torch.equal(values[:, 0], values[:, 1]) for values in (theta, alpha)):
        return None
    return LayerParameters(theta[:, 0].flatten(), alpha[:, 0].flatten(), variant, layer.group_size)


def nearest_scaled_rotation(rotation: Rotation) -> Rotation:
    """The rotation with equal rows in each pair that is nearest in the Frobenius norm: the mean of both rows."""
    size = rotation.group_size
    direct, cross = ((vector + swap_unsigned(vector, size)) / 2 for vector in (rotation.direct, rotation.cross))
    return Rotation(direct, cross, size)


def _loss(before: LayerParameters, after: Rotation | None) -> LayerLoss:
    """What a layer lost; after: None where it is the same."""
    rotation = in_float64("the adapter", before)
    return LayerLoss(
        lost=0.0 if after is None else squared_distance(rotation, after, Metric.CHORDAL),
        change=squared_distance(rotation, identity_like(rotation), Metric.CHORDAL),
        outputs=rotation.out_features,
        mirrored=int((determinant(rotation) < 0).sum()) // 2,
    )


def _computed_dtype(layer: LayerParameters) -> torch.dtype:
    return torch.float64 if layer.theta.dtype == torch.float64 else torch.float32


def _config(adapter: Adapter, layers: Mapping[str, LayerParameters], variant: Variant | None) -> dict[str, Any]:
    config = dict(adapter.config)
    if variant is not None:
        config = {key: value for key, value in config.items() if key != "variant_pattern"} | {"variant": variant.value}
    return grouped_config(config, layers)
