"""docs/inspecting.md is one program, and its pictures have words."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from tests.guides import DOCS, blocks_of, run

PAGE = DOCS / "inspecting.md"


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    blocks = blocks_of("inspecting.md")
    assert blocks
    run(blocks, tmp_path)
    assert (tmp_path / "report.html").is_file()


def test_the_pictures_are_there_at_both_widths_in_both_schemes_with_words() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r'(?:src|srcset)="images/(inspect-[\w-]+\.png)"', text))
    widths = {(name.rsplit("-", 2)[1], name.rsplit("-", 2)[2]) for name in named}
    assert widths == {(width, f"{scheme}.png") for width in ("1280", "390") for scheme in ("light", "dark")}
    for name in named:
        with Image.open(PAGE.parent / "images" / name) as image:
            assert image.width == int(name.rsplit("-", 2)[1])
        assert (PAGE.parent / "images" / name).stat().st_size < 200_000
    assert all(len(words) > 20 for words in re.findall(r'alt="([^"]*)"', text))
    assert text.count("<img") == text.count('alt="')
