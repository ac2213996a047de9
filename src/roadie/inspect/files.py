"""A report as files: the page replaced as a whole, the pictures as bytes by name."""

from __future__ import annotations

import os
from pathlib import Path

from roadie.checkpoint.replacement import replace_file
from roadie.errors import ConfigError
from roadie.inspect.page import to_html
from roadie.inspect.rendering import to_png
from roadie.inspect.report import Report
from roadie.inspect.theme import DARK, LIGHT


def to_pngs(report: Report) -> dict[str, bytes]:
    """Every picture of `report` in both themes: ``KEY-light.png`` and ``KEY-dark.png`` -> the file's bytes.

    Raises `ConfigError` where matplotlib is not installed.
    """
    themes = {"light": LIGHT, "dark": DARK}
    return {
        f"{picture.key}-{name}.png": to_png(picture, theme)
        for picture in report.pictures
        for name, theme in themes.items()
    }


def check_page(path: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` where `path` cannot become a page: it is there and no plain file, or does not end in .html."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"{path}: got a page of that name; wanted one that ends in .html, so that nothing else is replaced"
        )
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(
            f"{path}: got something that is not a plain file; wanted the name of a page; choose another name"
        )


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page of `report` to `path`; what was there is replaced as a whole, or stays if anything fails.

    Raises `ConfigError` where `path` is a folder or matplotlib is missing, `OSError` where the disk refuses.
    """
    check_page(path)
    page = to_html(report)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, page)
