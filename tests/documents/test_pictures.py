"""The drawn pictures show what there is, fetch nothing, and are small; every picture of a document has words."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from tests.guides import DOCS

PICTURES = SimpleNamespace(**runpy.run_path(str(DOCS.parent / "scripts" / "pictures.py")))
DRAWN = sorted((DOCS / "images").glob("*.svg"))
PAGES = sorted(DOCS.rglob("*.md"))


def test_the_pairs_that_turn_are_those_of_the_adapter() -> None:
    drawn = (DOCS / "images" / "turning.svg").read_text(encoding="utf-8")
    path = re.search(r"<title>([\w.]+):", drawn)[1]
    pairs = PICTURES.pairs_of(PICTURES.shown_adapter(), path)
    labels = [f"{pair.degrees:+.0f}°, x{pair.scale:.2f}" for pair in pairs]
    assert re.findall(r">([+-]\d+°, x[\d.]+)</text>", drawn) == labels
    # A road_1 block multiplies by one complex number, whose parts are float32: a cosine or sine that is right to a step, and a
    # product, which is rounded.
    rounded = 1.5 * torch.finfo(torch.float32).eps
    for pair in pairs:
        assert abs(pair.after / pair.before) == pytest.approx(pair.scale, rel=rounded, abs=0)


def test_an_arrow_goes_to_the_end_and_back() -> None:
    way = list(PICTURES.frames(1 + 0j, 2j))
    assert way[0] == way[-1] == pytest.approx(1)
    assert way[len(way) // 2] == pytest.approx(2j)
    turned = [abs(each) for each in way[: len(way) // 2]]
    assert turned == sorted(turned)


@pytest.mark.parametrize("picture", DRAWN, ids=lambda path: path.name)
def test_a_drawn_picture_stands_for_itself(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    fetched = re.findall(r"""(?:href|src)=["']([^#"'][^"']*)|url\(["']?([^#"')]+)""", text)
    assert [each for each in fetched if not any(part.startswith("data:") for part in each)] == []
    assert "<script" not in text
    assert len(text) < 100_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_pictures_have_words(page: Path) -> None:
    assert all(words for words in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")))
