"""Pictures to bytes: SVG whose colours and fonts come from the page around it, and PNG in a theme.

A `Picture` is drawn once a rendering, by the same function; what differs is the theme.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from roadie.extras import need
from roadie.inspect.drawing import FONT_POINTS
from roadie.inspect.theme import NAMED, Theme, with_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DOTS_PER_INCH = 200


class Shape(str, Enum):
    """The room a picture takes on a page that is wide enough: one place, two beside each other, or two below each other."""

    PLAIN = "plain"
    WIDE = "wide"
    TALL = "tall"


@dataclass(frozen=True)
class Picture:
    """A figure to be drawn.

    key: its name as a file; alternative: what it shows, in words, for those who do not see it; caption: how to read it;
    width, height: inches; paint: draws it into axes with the colours of a theme; of: whose figure it is, for titles that
    stand alone.
    """

    key: str
    title: str
    alternative: str
    caption: str
    width: float
    height: float
    paint: Callable[[Any, Theme], None]
    shape: Shape = Shape.PLAIN
    of: str = ""

    @property
    def whole_title(self) -> str:
        """The title, and whose figure it is."""
        return f"{self.title}, {self.of}" if self.of else self.title


def to_svg(picture: Picture) -> str:
    """`picture` as an SVG element for an HTML page: colours are CSS variables, its ids belong to it alone.

    Raises `MissingExtra` without matplotlib.
    """
    with _settings(NAMED):
        figure = _drawn(picture, NAMED)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue().decode(), picture)


def to_png(picture: Picture, theme: Theme) -> bytes:
    """`picture` as a PNG file, with its alternative text as the Description; raises `MissingExtra` without matplotlib."""
    with _settings(theme):
        figure = _drawn(picture, theme)
        figure.suptitle(picture.whole_title, fontsize=FONT_POINTS + 1.5, color=theme.ink)
        stream = io.BytesIO()
        about = {"Title": picture.whole_title, "Description": picture.alternative, "Software": "roadie"}
        figure.savefig(stream, format="png", dpi=PNG_DOTS_PER_INCH, facecolor=theme.panel, metadata=about)
    return stream.getvalue()


def _drawn(picture: Picture, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(picture.width, picture.height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots()
    axes.set_facecolor("none")
    picture.paint(axes, theme)
    return figure


@contextmanager
def _settings(theme: Theme) -> Iterator[None]:
    """matplotlib's own settings, with ours on top and nobody else's; undone afterwards."""
    need("inspect", "matplotlib")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_parameters(theme))  # type: ignore[arg-type]
        yield


def _parameters(theme: Theme) -> dict[str, Any]:
    colours = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), theme.muted)
    colours |= {"text.color": theme.ink, "xtick.labelcolor": theme.muted, "ytick.labelcolor": theme.ink}
    sizes = dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), FONT_POINTS)
    # The salt makes ids, and with them the file, the same every time.
    drawing = {"svg.fonttype": "none", "svg.hashsalt": "roadie", "axes.linewidth": 0.7, "legend.fontsize": FONT_POINTS}
    return {
        **colours,
        **sizes,
        **drawing,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "xtick.major.width": 0.7,
    }


def _inline(text: str, picture: Picture) -> str:
    """matplotlib's SVG file as an element: no prologue, metadata or style; short numbers; ids that begin with the key."""
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    # Tags alone: what stands between them are names, which are nobody's to change.
    text = re.sub(r"<[^>]+>", lambda tag: _short_tag(tag[0], picture.key), text)
    text = re.sub(r">\s+<", "><", text).strip()
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box is not None
    label = html.escape(picture.alternative, quote=True)
    return with_variables(f'<svg {box[0]} role="img" aria-label="{label}">{text[opening.end() :]}')


def _short_tag(tag: str, key: str) -> str:
    tag = re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag)
    tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", tag)
    tag = re.sub(r"(font: [\d.]+px) '[^;\"]*'", r"\1 var(--font)", tag)
    return re.sub(r"\s+", " ", tag)
