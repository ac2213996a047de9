"""The polar scatter of an adapter's blocks: their turn and scale as points of the complex plane, around 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from roadie.inspect.theme import STEPS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plane(axes: Axes, theme: Theme, turning: Any, mirroring: Any) -> None:
    """Blocks in the plane: a dot where the block takes (1, 0), if it turns; a cross at q, if it mirrors (``[N]`` complex each).

    Dots are gathered in cells, and the darker one is (on dark ground: the lighter), the more blocks are in it.
    """
    everything = np.concatenate((turning, mirroring, [1.0]))
    centre, reach = _reach(everything)
    _polar_grid(axes, theme, centre, reach)
    _gathered(axes, theme, turning, centre, reach)
    if len(mirroring):
        x, y, _ = _occupied(mirroring, centre, reach)
        axes.plot(x, y, "x", color=theme.series[1], markersize=4, markeredgewidth=1.1, zorder=4)
    for colour, width, length in ((theme.panel, 3.6, 12), (theme.ink, 1.3, 10)):  # with a rim, to be seen among dots
        axes.plot([1], [0], marker="+", color=colour, markersize=length, markeredgewidth=width, zorder=5)
    axes.set_xlim(centre.real - reach, centre.real + reach)
    axes.set_ylim(centre.imag - reach, centre.imag + reach)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(theme.grid)


def _reach(points: Any) -> tuple[complex, float]:
    """The middle and half the side of the square with all `points`."""
    centre = complex((points.real.min() + points.real.max()) / 2, (points.imag.min() + points.imag.max()) / 2)
    far = max(np.abs(points.real - centre.real).max(), np.abs(points.imag - centre.imag).max())
    return centre, 1.12 * max(float(far), 0.02)


def _gathered(axes: Axes, theme: Theme, points: Any, centre: complex, reach: float) -> None:
    if not len(points):
        return
    x, y, counts = _occupied(points, centre, reach)
    shade = (np.log1p(counts) / np.log1p(counts.max()) * (STEPS - 1)).round().astype(int)
    # The palest shades would not be seen as single dots.
    for step in range(STEPS // 3, STEPS):
        chosen = np.maximum(shade, STEPS // 3) == step
        axes.plot(x[chosen], y[chosen], "o", color=theme.rising[step], markersize=2.5, markeredgewidth=0, zorder=3)


def _occupied(points: Any, centre: complex, reach: float, side: int = 56) -> tuple[Any, Any, Any]:
    """The middles of the cells of the window that hold points, and how many each holds."""
    edges = [np.linspace(middle - reach, middle + reach, side + 1) for middle in (centre.real, centre.imag)]
    counts, _, _ = np.histogram2d(points.real, points.imag, edges)
    columns, rows = np.nonzero(counts)
    x, y = ((edge[:-1] + edge[1:]) / 2 for edge in edges)
    return x[columns], y[rows], counts[columns, rows]


def _polar_grid(axes: Axes, theme: Theme, centre: complex, reach: float) -> None:
    """Circles of equal scale and rays of equal angle, as far as the window goes, with their values at its edge."""
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator

    corners = [centre + reach * complex(a, b) for a in (-1, 1) for b in (-1, 1)]
    inside = abs(centre.real) <= reach and abs(centre.imag) <= reach
    nearest = 0.0 if inside else min(abs(c) for c in corners) * 0.8
    radii: Any = MaxNLocator(5).tick_values(nearest, max(map(abs, corners)))
    for radius in radii[radii > 0].tolist():
        axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor=theme.grid, linewidth=0.7))
        _scale_label(axes, theme, radius, centre, reach)
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=theme.muted, linewidth=0.8, linestyle=(0, (3, 2))))
    angles = [np.degrees(np.angle(c)) for c in corners]
    every = 45 if inside else float(np.clip(_nice(max(angles) - min(angles)), 1, 45))
    for angle in np.arange(-180, 180, every).tolist():
        ray = np.exp(1j * np.radians(angle))
        axes.plot(
            [0, 20 * reach * ray.real + 20 * ray.real],
            [0, 20 * reach * ray.imag + 20 * ray.imag],
            color=theme.grid,
            lw=0.7,
        )
        _angle_label(axes, theme, angle, centre, reach)


def _nice(span: float) -> float:
    return min((1, 2, 5, 10, 15, 30, 45), key=lambda step: abs(span / 5 - step))


def _scale_label(axes: Axes, theme: Theme, radius: float, centre: complex, reach: float) -> None:
    if abs(centre.imag) < reach and abs(radius - centre.real) < 0.86 * reach:
        box = {"facecolor": theme.panel, "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
        axes.text(
            *(radius, centre.imag - 0.97 * reach),
            f"x{radius:g}",
            ha="center",
            va="bottom",
            color=theme.muted,
            bbox=box,
            zorder=6,
        )


def _angle_label(axes: Axes, theme: Theme, angle: float, centre: complex, reach: float) -> None:
    """The value of a ray where it leaves the window, unless that is below, where the scales stand."""
    ray = np.exp(1j * np.radians(angle))
    far = _way_out(complex(ray), centre, 0.94 * reach)
    if far is None or (far * ray).imag < centre.imag - 0.85 * reach:
        return
    box = {"facecolor": theme.panel, "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
    where = far * ray
    axes.text(where.real, where.imag, f"{angle:g}°", ha="center", va="center", color=theme.muted, bbox=box, zorder=6)


def _way_out(ray: complex, centre: complex, half: float) -> float | None:
    """How far from 0 a ray leaves the square around `centre`; None where it never enters it."""
    enter, leave = 0.0, np.inf
    for along, middle in ((ray.real, centre.real), (ray.imag, centre.imag)):
        if abs(along) < 1e-9:
            if abs(middle) > half:
                return None
            continue
        near, far = sorted(((middle - half) / along, (middle + half) / along))
        enter, leave = max(enter, near), min(leave, far)
    return float(leave) if leave > enter else None
