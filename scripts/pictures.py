"""Two pictures of the documentation, made anew: ``python scripts/pictures.py``, about two minutes.

    docs/images/turning.svg    what an adapter does to pairs of a layer's outputs: real ones, of the embedded model, which turn
    docs/images/demo.svg       what `roadie demo` prints in a terminal

Both stand for themselves: no fonts or scripts are fetched. `make pictures` makes the others too.
"""

from __future__ import annotations

import cmath
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from roadie import checkpoint, embedded, inspect
from roadie.adapter import Adapter
from roadie.adapter_algebra import convert
from roadie.cli.demo import show_exactness, show_losses, show_size
from roadie.inspect.blocks import blocks_of
from roadie.rotation import to_blocks
from roadie.training.demo import DemoResult, run_demo

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
ADAPTER, PROMPT = "turtle", "The turtle draws a"
COLUMNS, ROWS, CELL, RADIUS = 6, 2, 116, 44
BEFORE, AFTER, INK, FAINT = "#7f8c8d", "#d55e00", "#566573", "#bfc9ca"
SECONDS = 4


@dataclass(frozen=True)
class Pair:
    """Two outputs of a layer as a complex number, before and after the adapter, and what their block does: turn and stretch."""

    before: complex
    after: complex
    degrees: float
    scale: float


def main() -> None:
    adapter = shown_adapter()
    path = inspect.examine({ADAPTER: adapter}).portraits[0].most_changed[0].path
    (IMAGES / "turning.svg").write_text(turning(path, pairs_of(adapter, path)), encoding="utf-8")
    (IMAGES / "demo.svg").write_text(terminal(run_demo()), encoding="utf-8")


def shown_adapter() -> Adapter:
    """The nearest of road_1, each of whose blocks turns and stretches all that comes to it alike."""
    return convert(checkpoint.load(embedded.adapters_path() / ADAPTER), "road_1").adapter


def pairs_of(adapter: Adapter, path: str) -> list[Pair]:
    """The pairs of a layer at the last token of a prompt which the adapter changes most, in their order."""
    outputs = outputs_of(path)
    layer = adapter.layers[path]
    pairs = outputs.view(-1, 2, layer.group_size // 2).transpose(1, 2).reshape(-1, 2)  # j and j + G/2 of each group
    turned = (to_blocks(layer.rotation).double() @ pairs.unsqueeze(-1)).squeeze(-1)
    blocks = blocks_of(adapter).of([path])
    found = [
        Pair(complex(*before), complex(*after), math.degrees(angle), scale)
        for before, after, angle, scale in zip(
            pairs.tolist(), turned.tolist(), blocks.angle.tolist(), blocks.scale.tolist(), strict=True
        )
    ]
    most = sorted(range(len(found)), key=lambda number: -blocks.squared_change[number])[: COLUMNS * ROWS]
    return [found[number] for number in sorted(most)]


@torch.no_grad()
def outputs_of(path: str) -> torch.Tensor:
    """What the layer at `path` of the embedded model gives for the last token of the prompt: float64 ``[D]``."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(**tokenizer(PROMPT, return_tensors="pt"))
    handle.remove()
    return seen[0][0, -1].double()


def turning(path: str, pairs: list[Pair]) -> str:
    """The pairs side by side: grey what the layer gives, coloured what comes out, which goes there again and again."""
    width, height = COLUMNS * CELL, ROWS * (CELL + 14) + 40
    title = f"{path}: the twelve pairs of its outputs that {ADAPTER!r} changes most, before and after"
    cells = "\n".join(
        drawn_pair(pair, (number % COLUMNS + 0.5) * CELL, number // COLUMNS * (CELL + 14) + 40 + RADIUS)
        for number, pair in enumerate(pairs)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">
<title>{title}</title>
<text x="{width / 2}" y="20" text-anchor="middle" fill="{INK}" font-size="13">{title}</text>
{cells}
</svg>
"""


def drawn_pair(pair: Pair, x: float, y: float) -> str:
    """A circle with both arrows, as long beside each other as they are, and what the block does below."""
    size = RADIUS / max(abs(pair.before), abs(pair.after))
    before, after = pair.before.conjugate() * size, pair.after.conjugate() * size  # the y of pictures goes down
    way = list(frames(before, after))
    moved = animated("x2", [each.real for each in way]) + animated("y2", [each.imag for each in way])
    return (
        f'<g transform="translate({x:.0f} {y:.0f})"><circle r="{RADIUS}" fill="none" stroke="{FAINT}"/>'
        f'<line x2="{before.real:.1f}" y2="{before.imag:.1f}" stroke="{BEFORE}" stroke-width="2"/>'
        f'<line x2="{after.real:.1f}" y2="{after.imag:.1f}" stroke="{AFTER}" stroke-width="3">{moved}</line>'
        f'<text y="{RADIUS + 16}" text-anchor="middle" fill="{INK}">{pair.degrees:+.0f}°, x{pair.scale:.2f}</text></g>'
    )


def animated(name: str, values: list[float]) -> str:
    listed = ";".join(f"{value:.1f}" for value in values)
    return f'<animate attributeName="{name}" dur="{SECONDS}s" repeatCount="indefinite" values="{listed}"/>'


def frames(before: complex, after: complex) -> Iterator[complex]:
    """From one end to the other by turning and stretching evenly, and back, with a rest at both ends."""
    way = cmath.log(after / before)
    for share in (0, 0, *(step / 8 for step in range(1, 8)), 1, 1, 1, *(step / 8 for step in range(7, -1, -1))):
        yield before * cmath.exp(way * share)


def terminal(result: DemoResult) -> str:
    """What the demo prints, as rich draws a terminal, with the fonts of whoever looks at it."""
    console = Console(record=True, width=76, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print("$ roadie demo\n")
    for show in (show_size, show_losses, show_exactness):
        show(console, result)
    drawn = console.export_svg(title="roadie demo", unique_id="roadie-demo")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)


if __name__ == "__main__":
    main()
