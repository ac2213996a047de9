"""Figures drawn with matplotlib, in any theme: cells, ridges, bands over depth, lines, and trees.

Each function draws into the axes it is given and reads colours from the theme alone. A heat map is one path a shade, however
many cells it has, which keeps a hundred rows by a hundred columns small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from roadie.inspect.theme import STEPS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_POINTS = 7.5
MOST_LABELS = 40
MOST_LINES = 6
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "X")


@dataclass(frozen=True)
class Scale:
    """Which values have which shade: from low to high, in equal steps; signed: low = -high, blue below 0, orange above."""

    low: float
    high: float
    signed: bool

    @classmethod
    def rising(cls, values: Any) -> Scale:
        """From 0 to the largest of `values`; from the smallest, where that is more than half of it."""
        most = _largest(values)
        known = np.asarray(values, dtype=float)
        least = float(np.nanmin(known)) if not np.isnan(known).all() else 0.0
        return cls(least if most / 2 < least < 0.98 * most else 0.0, most, False)

    @classmethod
    def around_zero(cls, values: Any) -> Scale:
        """As far below 0 as above."""
        most = _largest(values)
        return cls(-most, most, True)

    def shades(self, theme: Theme) -> tuple[str, ...]:
        """The colours, from low to high."""
        return theme.diverging if self.signed else theme.rising

    def steps(self, values: Any) -> Any:
        """The number of each value's shade, -1 for NaN."""
        share = (np.asarray(values, dtype=float) - self.low) / (self.high - self.low)
        known = ~np.isnan(share)
        return np.where(known, np.clip(np.where(known, share, 0) * STEPS, 0, STEPS - 1), -1).astype(int)


def _largest(values: Any) -> float:
    known = np.abs(np.asarray(values, dtype=float))
    known = known[~np.isnan(known)]
    return float(known.max()) if len(known) and known.max() > 0 else 1.0


def cells(
    axes: Axes, theme: Theme, values: Any, scale: Scale, rows: Sequence[str], columns: Sequence[str], label: str
) -> None:
    """A heat map of ``[rows, columns]`` values, the first row on top; NaN is left empty. With a legend below."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    values = np.asarray(values, dtype=float)
    _squares(axes, theme, scale, values)
    _name_ticks(axes, rows, columns)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    edges = np.linspace(scale.low, scale.high, STEPS + 1)
    mappable = ScalarMappable(BoundaryNorm(edges, STEPS), ListedColormap(scale.shades(theme)))
    assert axes.figure is not None
    bar = axes.figure.colorbar(mappable, ax=axes, location="top", fraction=0.05, aspect=40, pad=0.02, shrink=1.0)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=1)
    bar.minorticks_off()
    bar.set_ticks(_bar_ticks(scale), labels=[f"{tick:.3g}" for tick in _bar_ticks(scale)])
    first, _, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")  # at the edge of the figure there is no room for the other half
    last.set_horizontalalignment("right")
    bar.set_label(label)


def _bar_ticks(scale: Scale) -> list[float]:
    return [scale.low, (scale.low + scale.high) / 2, scale.high]


def _squares(axes: Axes, theme: Theme, scale: Scale, values: Any) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    few = values.size <= 1200
    half = 0.46 if few else 0.5
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    rows, starts, ends, steps = _runs(scale.steps(values), join=not few)
    x0, x1, y0, y1 = starts - half, ends - 1 + half, rows - half, rows + half
    corners = np.stack([np.stack(each, -1) for each in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))], 1)
    for step, colour in enumerate(scale.shades(theme)):
        chosen = corners[steps == step]
        if len(chosen):
            path = Path(chosen.reshape(-1, 2), np.tile(codes, len(chosen)))
            axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", linewidth=0, antialiased=few))


def _runs(steps: Any, *, join: bool) -> tuple[Any, Any, Any, Any]:
    """The row, the first column, the column after the last, and the shade of each cell, or of neighbours of one shade."""
    flat = steps.reshape(-1)
    begins: Any = np.ones(len(flat), dtype=bool)
    if join:
        begins[1:] = flat[1:] != flat[:-1]
        begins[:: steps.shape[1]] = True
    first = np.flatnonzero(begins)
    length: Any = np.diff(np.append(first, len(flat)))
    rows, columns = np.divmod(first, steps.shape[1])
    return rows, columns, columns + length, flat[first]


def _name_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    every = -(-len(rows) // MOST_LABELS)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    if len(columns) > MOST_LABELS:
        axes.set_xticks([])
        return
    axes.set_xticks(range(len(columns)), columns)
    if sum(map(len, columns)) > 34:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")


def ridges(axes: Axes, theme: Theme, values: Sequence[Any], names: Sequence[str], label: str) -> None:
    """A histogram a row, each to its own height, over one axis; a line at 0, where nothing is changed.

    The axis holds 99 % of all values, and what is beyond it is counted in the outermost bins.
    """
    everything = np.concatenate(values)
    low, high = _window(everything)
    edges = np.linspace(low, high, int(np.clip(2 * np.sqrt(np.median(list(map(len, values)))), 16, 60)) + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for row, each in enumerate(values):
        counts, _ = np.histogram(np.clip(each, low, high), edges)
        top = row - 0.86 * counts / max(counts.max(), 1)
        axes.fill_between(middles, row, top, step="mid", facecolor=theme.series[0], alpha=0.45, linewidth=0)
        axes.step(middles, top, where="mid", color=theme.series[0], linewidth=0.9)
        axes.axhline(row, color=theme.grid, linewidth=0.6, zorder=0)
    axes.axvline(0, color=theme.muted, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.9, -1.0)
    axes.set_xlim(low, high)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    _quiet(axes, left=False)


def _window(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, (0.005, 0.995))
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 0.1
    return float(low - room), float(high + room)


def bands(axes: Axes, theme: Theme, depths: Sequence[int], quantiles: Any, label: str) -> None:
    """Quantiles ``[5, depths]`` (5, 25, 50, 75, 95 %) over depth: the middle half and the middle nine tenths, shaded."""
    for low, high, alpha in ((0, 4, 0.22), (1, 3, 0.45)):
        axes.fill_between(depths, quantiles[low], quantiles[high], color=theme.series[0], alpha=alpha, linewidth=0)
    axes.plot(depths, quantiles[2], color=theme.series[0], linewidth=1.6, marker="o", markersize=2.6)
    axes.axhline(0, color=theme.muted, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_xlabel("depth")
    axes.set_ylabel(label)
    _whole_ticks(axes)
    _quiet(axes)


def lines(axes: Axes, theme: Theme, values: Any, names: Sequence[str], label: str) -> None:
    """A line a name over places: ``[names, places]``; at most six lines, which differ in colour, dashes and markers."""
    places = range(values.shape[1])
    for number, (name, row) in enumerate(zip(names, values, strict=True)):
        axes.plot(
            *(places, row),
            color=theme.series[number],
            linestyle=_DASHES[number],
            marker=_MARKERS[number],
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    axes.set_xlabel("place: 0 = embeddings, then each block")
    axes.set_ylabel(label)
    _whole_ticks(axes)
    _quiet(axes)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    assert axes.figure is not None
    if len(names) > 1:
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, handlelength=3.2, columnspacing=1.2
        )


def tree(axes: Axes, theme: Theme, branches: Any, heights: Any, names: Sequence[str]) -> None:
    """A dendrogram from left to right; branches, heights: scipy's icoord and dcoord; names: of the leaves, from the top."""
    from matplotlib.collections import LineCollection

    joints = np.stack((np.asarray(heights), (np.asarray(branches) - 5) / 10), -1)
    axes.add_collection(LineCollection(joints, colors=theme.series[0], linewidths=1.1))
    axes.set_yticks(range(len(names)), names)
    axes.yaxis.tick_right()
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(float(np.max(heights)) * 1.05 or 1.0, 0)
    axes.set_xlabel("distance")
    axes.tick_params(axis="y", length=0)
    _quiet(axes, left=False)


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _quiet(axes: Axes, *, left: bool = True) -> None:
    for side in ("top", "right", *(() if left else ("left",))):
        axes.spines[side].set_visible(False)
