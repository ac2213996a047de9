"""Pictures: the right shade in the right cell, colours that can be told apart, files that are the same every time."""

from __future__ import annotations

import io
import math
import re
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.inspect.made import drawn

from roadie import inspect as looking
from roadie.errors import ConfigError
from roadie.inspect.drawing import Scale, _runs
from roadie.inspect.maps import layer_map, matrix
from roadie.inspect.plane import _occupied, _reach, _way_out
from roadie.inspect.rendering import to_png, to_svg
from roadie.inspect.theme import DARK, LIGHT, NAMED, STEPS, style_variables

# Machado, Oliveira & Fernandes 2009, severity 1: what people without one kind of cone see, in linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}
THEMES = {"light": LIGHT, "dark": DARK}
both_themes = pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES.keys())


def linear(colour):
    parts = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(first, second):
    """WCAG's contrast of two colours, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def lab(colour, blindness):
    """CIE L*a*b* (D65) of a colour as it is seen."""
    seen = np.clip(np.array(BLINDNESS[blindness]) @ linear(colour), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ seen / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@both_themes
def test_text_can_be_read(theme):
    """4.5 is what WCAG AA asks of text, 3 of lines and marks."""
    for ground in (theme.ground, theme.panel):
        assert contrast(theme.ink, ground) >= 4.5
        assert contrast(theme.muted, ground) >= 4.5
        assert contrast(theme.series[0], ground) >= 4.5  # links
    assert all(contrast(colour, theme.panel) >= 3 for colour in theme.series)


@both_themes
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_shades_are_in_order_for_everybody(theme, blindness):
    lightness = [lab(colour, blindness)[0] for colour in theme.rising]
    steps = np.diff(lightness) if theme is DARK else -np.diff(lightness)
    assert (steps > 1).all()  # a difference of 1 is what an eye just sees


@both_themes
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_minus_and_plus_are_told_apart_by_everybody(theme, blindness):
    for step in range(STEPS // 2 - 1):
        minus, plus = (lab(theme.diverging[n], blindness) for n in (step, STEPS - 1 - step))
        assert np.linalg.norm(minus - plus) > 10


@both_themes
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_dots_and_crosses_are_told_apart_by_everybody(theme, blindness):
    assert np.linalg.norm(lab(theme.series[0], blindness) - lab(theme.series[1], blindness)) > 25


def test_every_colour_of_the_page_has_a_placeholder_of_its_own():
    named = NAMED.named
    assert len(set(named.values())) == len(named)
    assert re.findall(r"--([\w-]+):", style_variables(LIGHT)) == re.findall(r"--([\w-]+):", style_variables(DARK))
    assert list(named) == re.findall(r"--([\w-]+):", style_variables(LIGHT))


def test_a_value_has_the_shade_of_its_step():
    assert Scale(0, 12, False).steps([0, 0.99, 1, 11.99, 12, math.nan]).tolist() == [0, 0, 1, 11, 11, -1]
    signed = Scale.around_zero([-3, 1, math.nan])
    assert (signed.low, signed.high) == (-3, 3)
    assert signed.steps([-3, -0.01, 0.01, 3]).tolist() == [0, 5, 6, 11]


def test_a_scale_begins_at_0_unless_all_values_are_far_from_it():
    assert Scale.rising([1, 4]).low == 0
    assert Scale.rising([3, 4]).low == 3
    assert Scale.rising([3.99, 4]).low == 0  # next to no difference is not to look like much
    assert Scale.rising([math.nan, 0]) == Scale(0, 1, False)


@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_joined_cells_cover_what_the_cells_cover(rows, columns, data):
    steps = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=rows * columns, max_size=rows * columns)))
    steps = steps.reshape(rows, columns)
    for join in (False, True):
        filled = np.full((rows, columns), -9)
        for row, start, end, step in zip(*_runs(steps, join=join), strict=True):
            assert (filled[row, start:end] == -9).all()
            filled[row, start:end] = step
        assert (filled == steps).all()


class Place:
    def __init__(self, depth, kind, value):
        self.depth, self.kind, self.value = depth, kind, value


def cell_map():
    layers = [Place(0, "q_proj", 1.0), Place(1, "q_proj", 12.0), Place(1, "up_proj", 5.0), Place(1, "up_proj", 6.0)]
    return layer_map("map", "A map", layers, lambda layer: layer.value, "values", "caption")


def shade_of(svg, step):
    """The corners of everything filled with a shade, as (x, y)."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: var\(--rising-{step}\)', svg)
    return [tuple(map(float, pair)) for path in paths for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_cells_lie_where_they_belong_with_the_shade_of_their_value():
    """Of 0 to 12: 1 is step 1 (depth 0, above; first kind, left), 12 is 11 (below left), 5.5, the mean, is 5 (below right)."""
    svg = to_svg(cell_map())
    # Each shade is once in the legend too: the cells are the larger ones.
    spans = {}
    for step in (1, 5, 11):
        corners = shade_of(svg, step)[-4:] if len(shade_of(svg, step)) > 4 else shade_of(svg, step)
        spans[step] = corners
    assert all(spans.values())
    pixels = np.asarray(Image.open(io.BytesIO(to_png(cell_map(), LIGHT))).convert("RGB")).astype(int)
    middles = {}
    for step in (1, 5, 11):
        colour = [int(LIGHT.rising[step][n : n + 2], 16) for n in (1, 3, 5)]
        found = np.argwhere(np.abs(pixels - colour).max(-1) <= 1)
        tall = [row for row in np.unique(found[:, 0]) if (found[:, 0] == row).sum() > pixels.shape[1] / 5]
        assert len(tall) > 10, step
        middles[step] = found[np.isin(found[:, 0], tall)].mean(0)
    assert middles[1][0] < middles[11][0] == pytest.approx(middles[5][0], abs=2)
    assert middles[1][1] == pytest.approx(middles[11][1], abs=2)
    assert middles[11][1] < middles[5][1]


def test_the_words_for_a_map_are_those_of_its_values():
    assert cell_map().alternative == (
        "A map: values, 2 depths by 2 kinds of module. Largest 12 at depth 1, q_proj; smallest 1 at depth 0, q_proj."
    )


def test_a_large_matrix_stays_small():
    names = [f"a{n}" for n in range(100)]
    values = np.random.default_rng(0).random((100, 100))
    assert len(to_svg(matrix("m", "M", values, (names, names), "values", ""))) < 1_000_000


def test_pictures_are_the_same_every_time_and_have_their_words_inside():
    first, second = (to_svg(cell_map()), to_png(cell_map(), DARK)), (to_svg(cell_map()), to_png(cell_map(), DARK))
    assert first == second
    image = Image.open(io.BytesIO(first[1]))
    assert image.text["Description"] == cell_map().alternative
    assert image.convert("RGB").getpixel((1, 1)) == tuple(int(DARK.panel[n : n + 2], 16) for n in (1, 3, 5))


def test_settings_of_matplotlib_are_neither_used_nor_changed():
    import matplotlib

    plain = to_svg(cell_map())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert to_svg(cell_map()) == plain
        assert dict(matplotlib.rcParams) == before


def test_names_are_not_read_as_mathematics_or_markup():
    evil = "$x^2$ <b>&\"'</b> 0.123456 #fe00a5"
    names = [evil, "b"]
    svg = to_svg(matrix("m", "M", np.ones((2, 2)), (names, names), "values", ""))
    assert "<b>" not in svg
    assert "$x^2$ &lt;b&gt;&amp;" in svg
    assert "0.123456" in svg


def test_the_window_of_the_plane_holds_every_block():
    blocks = looking.report({"a": drawn("road_4", spread=1.0)}).sections[-1].pictures
    plane = next(picture for picture in blocks if picture.key.endswith("plane"))
    points = plane.paint.keywords["turning"]
    centre, reach = _reach(np.concatenate((points, plane.paint.keywords["mirroring"], [1.0])))
    for each in (points, plane.paint.keywords["mirroring"]):
        assert _occupied(each, centre, reach)[2].sum() == len(each) > 0


@pytest.mark.parametrize(
    ("ray", "centre", "half", "far"),
    [(1, 1, 0.5, 1.5), (1j, 0, 2, 2), (1, 1j, 0.5, None), (-1, 3, 1, None), (1j, 1, 0.5, None)],
)
def test_where_a_ray_leaves_the_window(ray, centre, half, far):
    assert _way_out(complex(ray), complex(centre), half) == far


def test_without_a_plotting_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (to_svg, partial(to_png, theme=LIGHT)):
        with pytest.raises(ConfigError, match=r'got no matplotlib; .*pip install "roadie\[inspect\]"'):
            draw(cell_map())
    looking.examine({"a": drawn(), "b": drawn(seed=1)})  # numbers need no pictures


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    adapters = {name: drawn(seed=n) for n, name in enumerate("abc")}
    with pytest.raises(ConfigError, match=r'got no scipy; .*pip install "roadie\[inspect\]"'):
        looking.report(adapters)
    looking.examine(adapters)
