"""A picture of a run, as plain SVG: for each kind of time, how many percent of them are no longer than so many milliseconds."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from roadie.traffic.summary import Distribution, Summary

WIDTH, PANEL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 210, 56, 24, 34, 40
MOST_POINTS = 400
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d2023}.faint{fill:#667077}.line{fill:none;stroke:#0b62a8;stroke-width:2}"
    ".grid{stroke:#dcdfe1;stroke-width:1}.mark{stroke:#c24e00;stroke-width:1;stroke-dasharray:4 3}rect{fill:#fff}"
)


def chart(summary: Summary, title: str) -> str:
    """An SVG document, in which `title` is text."""
    panels = [(name, each) for name, each in summary.distributions.items() if each.values_ms]
    height = TOP + len(panels) * PANEL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}"/>',
        f'<text x="{LEFT}" y="20">{html.escape(title)}: {summary.tokens_per_s:.0f} tokens a second</text>',
    ]
    for number, (name, each) in enumerate(panels):
        parts += _panel(name, each, TOP + number * PANEL_HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, each: Distribution, top: int) -> list[str]:
    most = _round_up(each.percentile(99.5))
    bottom, width, height = top + PANEL_HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT, PANEL_HEIGHT - BOTTOM - 14

    def place(value_ms: float, percent: float) -> tuple[float, float]:
        return LEFT + width * min(value_ms / most, 1), bottom - height * percent / 100

    parts = []
    for percent in (0, 50, 100):
        x, y = place(0, percent)
        parts.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="faint" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for step in range(5):
        x, y = place(most * step / 4, 0)
        parts.append(
            f'<text class="faint" x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{most * step / 4:g}</text>'
        )
    for percent in (50, 99):
        x, y = place(each.percentile(percent), percent)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{y:.1f}"/>')
    label = f"{name}, ms (median {each.percentile(50):.1f}, p99 {each.percentile(99):.1f})"
    parts.append(f'<text x="{LEFT}" y="{bottom + 33}">{label}</text>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _steps(each.values_ms)))
    return [*parts, f'<polyline class="line" points="{points}"/>']


def _steps(values_ms: Sequence[float]) -> list[tuple[float, float]]:
    """Value and percent of the values up to it, at `MOST_POINTS` of them at most."""
    count = len(values_ms)
    ranks = sorted({max(1, math.ceil(count * step / MOST_POINTS)) for step in range(MOST_POINTS + 1)})
    return [(0.0, 0.0), *((values_ms[rank - 1], 100 * rank / count) for rank in ranks)]


def _round_up(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(power * step for step in (1, 2, 4, 8, 10, 20) if power * step >= value)
