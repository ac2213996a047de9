"""The pictures of single adapters, and of all of them at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from roadie.inspect.blocks import Blocks
from roadie.inspect.drawing import Scale, bands, ridges
from roadie.inspect.maps import WIDTH, columns, cut, depth_label, layer_map, matrix
from roadie.inspect.plane import plane
from roadie.inspect.portrait import LayerPortrait, Portrait
from roadie.inspect.positions import in_order
from roadie.inspect.rendering import Picture

MOST_KINDS = 14
_CHANGE = "change, ||R - I|| / √D"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_RIDGES = "A histogram a kind of module, of all its pairs. The outermost bins hold what lies beyond."
_BANDS = "The line is the median; the darker band holds the middle half of all pairs, the paler one nine tenths."


def portrait_pictures(portrait: Portrait, blocks: Blocks, key: str) -> list[Picture]:
    """Heat maps, histograms, the plane and bands over depth, of one adapter; `key` begins the pictures' own."""
    pictures = [
        *_maps(portrait.layers, key),
        *_histograms(portrait, blocks, key),
        _plane(blocks, key),
        *_over_depth(portrait, blocks, key),
    ]
    return [replace(picture, of=portrait.name) for picture in pictures]


def _maps(layers: Sequence[LayerPortrait], key: str) -> list[Picture]:
    return [
        layer_map(
            *(f"{key}-angle", "Angle by layer", layers, lambda layer: layer.angle_degrees, "angle, degrees (rms)"),
            "Root mean square angle by which the pairs of a layer are turned.",
        ),
        layer_map(
            *(f"{key}-scale", "Log-scale by layer", layers, lambda layer: layer.log_scale, "mean ln(scale)"),
            "Orange: outputs grow; blue: they shrink. 0.05 is 5% more.",
            Scale.around_zero,
        ),
        layer_map(
            *(f"{key}-change", "Change by layer", layers, lambda layer: layer.change, _CHANGE),
            "Angle and scale together: how much an output changes, relative to itself.",
        ),
    ]


def _angles(blocks: Blocks) -> Any:
    return np.degrees(blocks.angle[~blocks.is_mirrored])


def _log_scales(blocks: Blocks) -> Any:
    return np.log(blocks.scale[blocks.scale > 0])


_READ: tuple[tuple[str, str, str, Callable[[Blocks], Any]], ...] = (
    ("angle", "Angle", "angle, degrees", _angles),
    ("scale", "Log-scale", "ln(scale)", _log_scales),
)


def _histograms(portrait: Portrait, blocks: Blocks, key: str) -> list[Picture]:
    kinds = in_order(list(dict.fromkeys(layer.kind for layer in portrait.most_changed))[:MOST_KINDS])
    at = {kind: blocks.of([layer.path for layer in portrait.layers if layer.kind == kind]) for kind in kinds}
    pictures = []
    for word, title, label, read in _READ:
        values = {kind: read(each) for kind, each in at.items()}
        values = {kind: each for kind, each in values.items() if len(each)}
        if values:
            said = "; ".join(f"{kind} {each.mean():.3g} ± {each.std():.3g}" for kind, each in values.items())
            alternative = f"Histograms of {label}, one a kind. Mean and standard deviation: {said}."
            paint = partial(ridges, values=list(values.values()), names=list(values), label=label)
            size = (WIDTH, max(3.2, 0.8 + 0.34 * len(values)))
            pictures.append(Picture(f"{key}-{word}s", f"{title}s by kind", alternative, _RIDGES, *size, paint))
    return pictures


def _over_depth(portrait: Portrait, blocks: Blocks, key: str) -> list[Picture]:
    depths = [depth for depth in columns(portrait.layers, "depth") if depth is not None]
    if len(depths) < 2:
        return []
    at = [blocks.of([layer.path for layer in portrait.layers if layer.depth == depth]) for depth in depths]
    pictures = []
    for word, title, label, read in _READ:
        values = [read(each) for each in at]
        if all(map(len, values)):
            quantiles = np.array([np.quantile(each, _QUANTILES) for each in values]).T
            alternative = _widest(depths, quantiles, label)
            paint = partial(bands, depths=depths, quantiles=quantiles, label=label)
            pictures.append(
                Picture(f"{key}-{word}-depth", f"{title} over depth", alternative, _BANDS, WIDTH, 2.3, paint)
            )
    return pictures


def _widest(depths: Sequence[int], quantiles: Any, label: str) -> str:
    where = int(np.argmax(quantiles[4] - quantiles[0]))
    return (
        f"Quantiles of {label} over {len(depths)} depths. The middle nine tenths are widest at depth {depths[where]}, from "
        f"{quantiles[0, where]:.3g} to {quantiles[4, where]:.3g}."
    )


def _plane(blocks: Blocks, key: str) -> Picture:
    mirrored = blocks.is_mirrored
    turning, mirroring = blocks.turning[~mirrored], blocks.mirroring[mirrored]
    count = f"{len(turning):,} blocks that turn" + (
        f", {len(mirroring):,} that mirror" if len(mirroring) else "; none mirrors"
    )
    middle = f" Half of the angles are within {np.median(np.abs(_angles(blocks))):.3g} degrees." if len(turning) else ""
    crosses = " Crosses are mirrored blocks, at twice the angle of their mirror." if len(mirroring) else ""
    return Picture(
        f"{key}-plane",
        "All blocks",
        f"Polar scatter of angle and scale: {count}.{middle}",
        f"{count}. A dot is where a block takes an output of 1: angle and distance from 0 are its turn and its scale; "
        f"+ is no change.{crosses}",
        *(WIDTH, 3.6),
        partial(plane, turning=turning, mirroring=mirroring),
    )


def overview_pictures(portraits: Sequence[Portrait]) -> list[Picture]:
    """All adapters at a glance, a row each: change by kind and by depth, log-scale by kind."""
    return [
        _overview(portraits, "change-kind", "Change by kind", "kind", _change, _CHANGE),
        _overview(portraits, "change-depth", "Change by depth", "depth", _change, _CHANGE),
        _overview(
            portraits, "scale-kind", "Log-scale by kind", "kind", _log_scale, "mean ln(scale)", Scale.around_zero
        ),
    ]


def _overview(
    portraits: Sequence[Portrait],
    key: str,
    title: str,
    what: str,
    measure: Callable[[Sequence[LayerPortrait]], float],
    label: str,
    scale: Callable[[Any], Scale] = Scale.rising,
) -> Picture:
    across = columns([layer for portrait in portraits for layer in portrait.layers], what)
    values = [
        [measure([x for x in each.layers if getattr(x, what) == column]) for column in across] for each in portraits
    ]
    heads = [depth_label(column) if what == "depth" else column for column in across]
    names = [cut(portrait.name) for portrait in portraits]
    return matrix(f"overview-{key}", title, np.array(values), (names, heads), label, "A row an adapter.", scale)


def _change(layers: Sequence[LayerPortrait]) -> float:
    outputs = sum(layer.out_features for layer in layers)
    return math.sqrt(sum(layer.out_features * layer.change**2 for layer in layers) / outputs) if layers else math.nan


def _log_scale(layers: Sequence[LayerPortrait]) -> float:
    known = [(layer.out_features, layer.log_scale) for layer in layers if layer.log_scale is not None]
    return sum(n * scale for n, scale in known) / sum(n for n, _ in known) if known else math.nan
