"""The pictures of many adapters beside each other, of what two share, and of hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from roadie.extras import need
from roadie.inspect.comparison import Comparison, Sharing
from roadie.inspect.drawing import MOST_LINES, Scale, lines, tree
from roadie.inspect.maps import MANY, WIDTH, cut, layer_map, matrix
from roadie.inspect.rendering import Picture, Shape
from roadie.inspect.states import StateChange

_DISTANCE = "distance, ||Ra - Rb|| / √D"


def comparison_pictures(comparison: Comparison) -> list[Picture]:
    """Distances and alignments in the order of the tree, the tree, and agreement by layer.

    Raises `MissingExtra` where scipy is not installed.
    """
    branches, heights, order = _clustered(comparison)
    names = [cut(comparison.names[n]) for n in order]
    distance, alignment = (_ordered(values, order) for values in (comparison.distance, comparison.alignment))
    return [
        matrix(
            *("distances", "Distances", distance, (names, names), _DISTANCE),
            "The order is that of the tree: similar adapters stand together.",
        ),
        _tree(branches, heights, names),
        matrix(
            *("alignments", "Alignments", alignment, (names, names), "alignment of changes"),
            "1: two adapters change alike; 0: they have nothing in common; -1: each undoes the other.",
            _alignment_scale,
        ),
        layer_map(
            *("agreement", "Agreement by layer", comparison.layers, lambda layer: layer.alignment),
            "mean alignment of all pairs",
            "Where adapters change alike (orange), and where each goes its own way (near 0).",
            _alignment_scale,
        ),
    ]


def sharing_pictures(sharing: Sharing) -> list[Picture]:
    """What two adapters share, layer by layer."""
    pictures = [
        layer_map(
            *("shared-alignment", "Alignment by layer", sharing.layers, lambda layer: layer.alignment),
            "alignment of changes",
            "Orange: both change this layer alike; blue: against each other. Empty: at most one of them changes it.",
            _alignment_scale,
        ),
        layer_map(
            *("shared-distance", "Distance by layer", sharing.layers, lambda layer: layer.distance, _DISTANCE),
            "Where the two differ most.",
        ),
    ]
    return [replace(picture, of=f"{cut(sharing.first)} and {cut(sharing.second)}") for picture in pictures]


def state_pictures(changes: Sequence[StateChange]) -> list[Picture]:
    """dM and dD over places; of more than six changes, those that turn the last state most."""
    shown = sorted(changes, key=lambda change: change.places[-1].direction)[:MOST_LINES]
    read = f"Mean over {shown[0].tokens:,} tokens."
    if len(shown) < len(changes):
        read += f" The {MOST_LINES} of {len(changes)} that turn the last state most."
    length, direction = ([[getattr(p, of) for p in each.places] for each in shown] for of in ("length", "direction"))
    names = [cut(change.name) for change in shown]
    return [
        _lines("states-length", "Length of hidden states", names, length, "dM", f"0: as long as before. {read}"),
        _lines(
            "states-direction",
            "Direction of hidden states",
            names,
            direction,
            "dD = cos(x, x0)",
            f"1: as before. {read}",
        ),
    ]


def _lines(key: str, title: str, names: list[str], values: list[list[float]], label: str, caption: str) -> Picture:
    said = "; ".join(
        f"{name}: {row[0]:.3g} at the first, {row[-1]:.3g} at the last" for name, row in zip(names, values, strict=True)
    )
    alternative = f"{label} at {len(values[0])} places from the embeddings on. {said}."
    paint = partial(lines, values=np.array(values), names=names, label=label)
    return Picture(key, title, alternative, caption, WIDTH, 2.7, paint)


def _ordered(values: Any, order: Sequence[int]) -> Any:
    """The matrix in the order of the tree, without its diagonal, which says nothing."""
    ordered = np.array(values, dtype=float)[np.ix_(order, order)]
    np.fill_diagonal(ordered, np.nan)
    return ordered


def _alignment_scale(values: Any) -> Scale:
    """Around 0, as far as the values go, but never so near that what is next to nothing looks like much."""
    most = max(0.2, Scale.around_zero(values).high)
    return Scale(-most, most, True)


def _tree(branches: Any, heights: Any, names: Sequence[str]) -> Picture:
    order = ", ".join(names[:30]) + (" and so on" if len(names) > 30 else "")
    return Picture(
        "tree",
        "Families",
        f"Dendrogram of {len(names)} adapters by average distance, from {np.max(heights):.3g} down. In its order: {order}.",
        "Adapters whose branches meet far to the right are alike. Average linkage of the distances.",
        *(WIDTH, 0.7 + 0.15 * len(names)),
        partial(tree, branches=branches, heights=heights, names=names),
        shape=Shape.TALL if len(names) > MANY else Shape.PLAIN,
    )


def _clustered(comparison: Comparison) -> tuple[Any, Any, list[int]]:
    """scipy's branches and heights, and the order of the adapters in the tree."""
    need("inspect", "scipy")
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    distance = np.array(comparison.distance)
    links = linkage(squareform((distance + distance.T) / 2, checks=False), method="average", optimal_ordering=True)
    drawn = dendrogram(links, no_plot=True)
    return drawn["icoord"], drawn["dcoord"], drawn["leaves"]
