"""Colours: two themes for pictures, and a third whose colours are names that a page's style sheet fills in.

Blue against orange, and shades that get steadily darker (on dark ground: lighter), can be told apart with every common kind
of colour blindness, and in grey. Lines differ in their dashes and markers too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEPS = 12
_ORDER = ("ground", "panel", "ink", "muted", "grid")


@dataclass(frozen=True)
class Theme:
    """Colours as ``#rrggbb``. ground: of the page; panel: behind a figure; rising: few to many; diverging: minus to plus."""

    ground: str
    panel: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    rising: tuple[str, ...]
    diverging: tuple[str, ...]

    @property
    def named(self) -> dict[str, str]:
        """Every colour, by the name of its CSS variable without the two hyphens."""
        groups = {"series": self.series, "rising": self.rising, "diverging": self.diverging}
        numbered = {f"{group}-{n}": colour for group, colours in groups.items() for n, colour in enumerate(colours)}
        return {name: getattr(self, name) for name in _ORDER} | numbered


def _shades(*anchors: str) -> tuple[str, ...]:
    """STEPS colours, evenly along the anchors."""
    points = [tuple(int(anchor[n : n + 2], 16) for n in (1, 3, 5)) for anchor in anchors]
    colours = []
    for step in range(STEPS):
        at = step * (len(points) - 1) / (STEPS - 1)
        low = min(int(at), len(points) - 2)
        parts = (a + (b - a) * (at - low) for a, b in zip(points[low], points[low + 1], strict=True))
        colours.append("#" + "".join(f"{round(part):02x}" for part in parts))
    return tuple(colours)


LIGHT = Theme(
    ground="#f5f6f8",
    panel="#ffffff",
    ink="#1b2430",
    muted="#556170",
    grid="#d8dde4",
    series=("#0b6cb0", "#c24e00", "#007a5a", "#9a3f78", "#6f6100", "#47515e"),
    rising=_shades("#e9f0f6", "#a5c9e5", "#4c94c8", "#145a9c", "#072650"),
    diverging=_shades("#0a4a86", "#63a4d4", "#e3edf4", "#f8e8d8", "#eb9a52", "#933f00"),
)
DARK = Theme(
    ground="#11161d",
    panel="#1a212b",
    ink="#e7ecf3",
    muted="#a3b0c0",
    grid="#384351",
    series=("#62b4ee", "#ff9a4a", "#40cf9f", "#e79fc9", "#e6d84a", "#b9c5d2"),
    rising=_shades("#222d3a", "#1f4e76", "#2d80ba", "#74bbe8", "#e8f5ff"),
    diverging=_shades("#9fd2fa", "#2f78ad", "#223446", "#3d2e20", "#b4661f", "#ffc68a"),
)


def _placeholders(theme: Theme) -> dict[str, str]:
    """Each name of a colour -> a colour that nothing else has."""
    return {name: f"#fe{number:02x}a5" for number, name in enumerate(theme.named)}


_PLACEHOLDER = _placeholders(LIGHT)
NAMED = Theme(
    **{name: _PLACEHOLDER[name] for name in _ORDER},
    series=tuple(_PLACEHOLDER[f"series-{n}"] for n in range(len(LIGHT.series))),
    rising=tuple(_PLACEHOLDER[f"rising-{n}"] for n in range(STEPS)),
    diverging=tuple(_PLACEHOLDER[f"diverging-{n}"] for n in range(STEPS)),
)
"""Colours that stand for names: `with_variables` puts ``var(--name)`` in their place."""


def with_variables(svg: str) -> str:
    """`svg`, drawn in `NAMED`, with CSS variables for colours."""
    name_of = {colour: name for name, colour in _PLACEHOLDER.items()}
    return re.sub(r"#fe[0-9a-f]{2}a5", lambda match: f"var(--{name_of[match[0]]})", svg)


def style_variables(theme: Theme) -> str:
    """The CSS declarations that give the names of `NAMED` the colours of `theme`."""
    return "".join(f"--{name}:{colour};" for name, colour in theme.named.items())
