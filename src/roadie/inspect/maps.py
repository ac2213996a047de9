"""Heat maps as pictures: a measure of layers by depth and kind, and matrices with names on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from roadie.inspect.drawing import MOST_LABELS, Scale, cells
from roadie.inspect.positions import in_order
from roadie.inspect.rendering import Picture, Shape

WIDTH = 3.6
MANY = 24


def layer_map(
    key: str,
    title: str,
    layers: Sequence[Any],
    measure: Callable[[Any], float | None],
    label: str,
    caption: str,
    scale: Callable[[Any], Scale] = Scale.rising,
) -> Picture:
    """A heat map of `measure`, depth by kind; a cell of several layers (experts) has their mean, None is left empty.

    layers: of any kind that has a depth and a kind; scale: makes the shades from the values.
    """
    depths, kinds = columns(layers, "depth"), columns(layers, "kind")
    values = _grid(layers, measure, depths, kinds)
    height = 1.15 + 0.062 * max(map(len, kinds)) + min(0.165 * len(depths), 6.0)
    rows = list(map(depth_label, depths))
    return Picture(
        key,
        title,
        f"{title}: {label}, {len(depths)} depths by {len(kinds)} kinds of module. {_extremes(values, rows, kinds)}",
        caption,
        *(WIDTH, height),
        partial(cells, values=values, scale=scale(values), rows=rows, columns=kinds, label=label),
    )


def matrix(
    key: str,
    title: str,
    values: Any,
    names: tuple[Sequence[str], Sequence[str]],
    label: str,
    caption: str,
    scale: Callable[[Any], Scale] = Scale.rising,
) -> Picture:
    """A heat map of ``[rows, columns]`` values with their names; wide where there are many rows."""
    rows, columns = names
    longest = max(map(len, columns)) if len(columns) <= MOST_LABELS else 0
    many = len(rows) > MANY and len(columns) > MANY
    height = 0.9 + 0.05 * longest + float(np.clip(0.17 * len(rows), 0.5, 5.6))
    known = values[~np.isnan(values)]
    extent = f"from {known.min():.3g} to {known.max():.3g}" if len(known) else "nothing to show"
    return Picture(
        key,
        title,
        f"{title}: {label}, {len(rows)} by {len(columns)}, {extent}.",
        caption,
        *(WIDTH * (1.6 if many else 1), height),
        partial(cells, values=values, scale=scale(values), rows=rows, columns=columns, label=label),
        shape=Shape.WIDE if many else Shape.PLAIN,
    )


def columns(layers: Sequence[Any], what: str) -> list[Any]:
    """The depths of layers, in order, those without one last; or their kinds, in the order of use."""
    found = dict.fromkeys(getattr(layer, what) for layer in layers)
    return sorted(found, key=lambda depth: (depth is None, depth)) if what == "depth" else in_order(found)


def depth_label(depth: int | None) -> str:
    """What a row or column of a depth is called."""
    return "none" if depth is None else str(depth)


def cut(name: str, most: int = 26) -> str:
    """`name`, short enough for a label."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _grid(
    layers: Sequence[Any], measure: Callable[[Any], float | None], depths: Sequence[Any], kinds: Sequence[str]
) -> Any:
    sums, counts = np.zeros((len(depths), len(kinds))), np.zeros((len(depths), len(kinds)))
    for layer in layers:
        value = measure(layer)
        if value is not None:
            where = depths.index(layer.depth), kinds.index(layer.kind)
            sums[where] += value
            counts[where] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _extremes(values: Any, depths: Sequence[str], kinds: Sequence[str]) -> str:
    if np.isnan(values).all():
        return "Nothing to show."
    said = []
    for word, find in (("Largest", np.nanargmax), ("smallest", np.nanargmin)):
        row, column = map(int, np.unravel_index(find(values), values.shape))
        said.append(f"{word} {values[row, column]:.3g} at depth {depths[row]}, {kinds[column]}")
    return "; ".join(said) + "."
