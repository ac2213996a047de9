"""The page in a browser, from the disk, with the network off: it complains of nothing, fits, and can be read."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tests.inspect.made import drawn

from roadie import inspect as looking
from roadie.inspect.theme import DARK, LIGHT

CHROMIUM = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "chromium.py")))
pytestmark = pytest.mark.skipif(
    CHROMIUM.installed() is None, reason="no Chromium on this machine (apt install chromium)"
)

WIDTHS = (1280, 390)
SCHEMES = {"light": LIGHT, "dark": DARK}

# Text of figures that overlaps other text of the same figure, or is cut off by it; a pixel of tolerance for rounding.
FAULTS = """[...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].filter((text) => text.getBoundingClientRect().width > 0);
  const straight = texts.filter((text) => !/rotate\\(-?(45|90|315)/.test(text.getAttribute('transform') || ''));
  const places = straight.map((text) => [text.textContent, text.getBoundingClientRect()]);
  const cut = texts.map((text) => [text.textContent, text.getBoundingClientRect()])
    .filter(([, r]) => r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1);
  const over = places.flatMap(([a, r], i) => places.slice(i + 1)
    .filter(([, s]) => r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 2 && s.top < r.bottom - 2)
    .map(([b]) => a + ' | ' + b));
  const title = svg.closest('figure').querySelector('h3').textContent;
  return [...cut.map(([a]) => title + ': cut off: ' + a), ...over.map((a) => title + ': overlap: ' + a)];
})"""
SMALLEST = """Math.min(...[...document.querySelectorAll('figure svg text')].map((text) => {
  const shape = text.getScreenCTM();
  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(shape.a, shape.b);
}))"""


@pytest.fixture(scope="module")
def browser():
    with CHROMIUM.chromium(CHROMIUM.installed()) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    adapters = {
        "polite": drawn("road_1", seed=1, layers=12),
        "french": drawn("road_2", seed=2, layers=12),
        "wild-and-with-a-very-long-name-indeed": drawn("road_4", seed=3, spread=0.9, layers=12),
    }
    path = tmp_path_factory.mktemp("pages") / "report.html"
    looking.write_html(looking.report(adapters), path)
    return path


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def opened(request, browser, page):
    width, scheme = request.param
    return browser.open(page, width=width, scheme=scheme), width, scheme, page


def test_it_complains_of_nothing_and_asks_for_nothing(opened):
    found, _, _, page = opened
    assert found.complaints == []
    assert found.requests == [page.as_uri()]


def test_it_is_no_wider_than_the_window(opened):
    found, width, _, _ = opened
    assert found.evaluate("document.documentElement.scrollWidth") == width


def test_no_text_of_a_figure_is_cut_off_or_lies_on_another(opened):
    assert opened[0].evaluate(FAULTS) == []


def test_text_of_figures_is_large_enough_to_read(opened):
    assert opened[0].evaluate(SMALLEST) >= 8.5


def test_it_has_the_colours_of_the_scheme(opened):
    found, _, scheme, _ = opened
    pixels = Image.open(io.BytesIO(found.screenshot(height=100))).convert("RGB")
    assert pixels.getpixel((2, 2)) == tuple(int(SCHEMES[scheme].ground[n : n + 2], 16) for n in (1, 3, 5))
    assert found.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill").startswith("rgb(")


def test_a_page_that_does_complain_is_noticed(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<!doctype html><html><body style="width:3000px"><script>console.error("no")</script><img src="https://example.org/x.png">'
        '<figure><h3>f</h3><svg width="50" height="20"><text x="0" y="15">one</text><text x="5" y="15">two</text></svg></figure>'
    )
    found = browser.open(path, width=390, scheme="light")
    assert any("no" in complaint for complaint in found.complaints)
    assert "https://example.org/x.png" in found.requests
    assert found.evaluate("document.documentElement.scrollWidth") > 390
    assert found.evaluate(FAULTS) == ["f: overlap: one | two"]
