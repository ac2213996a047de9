"""The reports of docs/inspecting.md, photographed: from the demo's adapters of the embedded model.

    python scripts/report_example.py            trains the demo's three adapters and writes docs/images/inspect-*.png
    python scripts/report_example.py FOLDER     the pages and whole screenshots go to FOLDER too, to be looked at; adapters
                                                that are in FOLDER/demo already are not trained again

Needs a Chromium (``apt install chromium``).
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chromium import Chromium, chromium, installed
from PIL import Image

from roadie import inspect as looking
from roadie.adapter import Adapter
from roadie.embedded import NAME
from roadie.inspect.states import StateChange
from roadie.training.demo import run_demo
from roadie.training.inspection import TextSettings, find_subjects, gather

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
SHOWN_PIXELS = {1280: 1150, 390: 1700}
"""How much of a page a picture in the guide shows, from its top or from a section on."""


def main(folder: Path) -> None:
    """Train, look, photograph."""
    program = installed()
    if program is None:
        raise SystemExit("got no Chromium on this machine; wanted one; run: apt install chromium")
    adapters, states = demo_adapters(folder)
    pages = {
        "one": looking.report({"turtle": adapters["turtle"]}),
        "many": looking.report(adapters, states),
    }
    with chromium(program) as browser:
        for name, report in pages.items():
            path = folder / f"{name}.html"
            looking.write_html(report, path)
            for width in WIDTHS:
                for scheme in SCHEMES:
                    photograph(browser, path, width, scheme)


def demo_adapters(folder: Path) -> tuple[Mapping[str, Adapter], tuple[StateChange, ...]]:
    """The adapters of `roadie demo`, and how they move the hidden states on the documentation of this project."""
    if not (folder / "demo").is_dir():
        run_demo(output=folder / "demo")
    kinds = sorted(path.name for path in (folder / "demo").iterdir() if path.is_dir())
    text = str(IMAGES.parent / "mathematics.md")
    gathered = gather(find_subjects([str(folder / "demo" / kind) for kind in kinds]), text=TextSettings((text,)))
    named = {
        kind: replace(adapter, config={**adapter.config, "base_model_name_or_path": NAME})
        for kind, adapter in gathered.adapters.items()
    }
    return named, gathered.states


def photograph(browser: Chromium, path: Path, width: int, scheme: str) -> None:
    """The whole page beside it, and its beginning in the guide's folder."""
    page = browser.open(path, width=width, scheme=scheme)
    if page.complaints:
        raise SystemExit(f"{path.name}: {page.complaints}")
    name = f"inspect-{path.stem}-{width}-{scheme}.png"
    (path.parent / name).write_bytes(page.screenshot())
    save_small(page.screenshot(height=SHOWN_PIXELS[width]), IMAGES / name)
    if page.evaluate("document.getElementById('states') !== null"):
        top, height = page.evaluate(
            "(({top, height}) => [Math.floor(top) - 12, Math.ceil(height) + 24])("
            "document.getElementById('states').parentElement.getBoundingClientRect())"
        )
        save_small(page.screenshot(top=top, height=height), IMAGES / f"inspect-states-{width}-{scheme}.png")


def save_small(png: bytes, path: Path) -> None:
    """At most 256 colours, also those that few pixels have: the ends of a scale."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
