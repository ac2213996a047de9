"""docs/fit.md: a guide, and what the newest record of `benchmarks.fit` says."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.record import RESULTS
from benchmarks.tables import markdown

DOCUMENT = ROOT / "docs" / "fit.md"
GUIDE = Path(__file__).with_name("fit_guide.md")
Record = dict[str, Any]
Row = dict[str, Any]


def path_of(record: Record) -> Path:
    """Where a record belongs."""
    return RESULTS / record["machine"]["name"] / f"fit-{record['commit']}.json"


def newest() -> Record | None:
    """The committed record with the latest date; None where there is none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/fit-*.json")]
    return max(records, key=lambda record: record["date"], default=None)


def text_of(record: Record) -> str:
    """The document; equal for equal records."""
    losses, streaming = (record["parts"].get(part) for part in ("losses", "streaming"))
    parts = [GUIDE.read_text(encoding="utf-8").rstrip()]
    if losses:
        parts += _losses(losses)
    if streaming:
        parts += _streaming(streaming)
    parts.append(_machine(record))
    return "\n\n".join(parts) + "\n"


def _losses(part: dict[str, Any]) -> Iterator[str]:
    settings = part["settings"]
    yield "## What it buys, measured"
    yield _filled(
        f"The embedded model is fully fine-tuned on the {settings['kind']} kind of text (AdamW, {settings['steps']} steps of "
        f"{settings['rows']} rows of {settings['row_tokens']} tokens, learning rate {settings['learning_rate']:g}, seed "
        f"{settings['seed']}), once with all parameters and once with the linear layers alone. Adapters for all linear "
        "layers are fitted, and LoRA extracted from the same change by SVD, with the same rank everywhere and with the ranks "
        f"that explain most for their parameters. Fits to outputs see {settings['fitted_rows']} rows of the text that was "
        f"trained on. Losses are nats per token on {settings['measured_rows']} held-out rows. The gain is the loss below the "
        "base model's, as a part of the tuned model's; below 0 the adapter does harm. One model, one kind of text, one seed."
    )
    for name, rows in part["tunings"].items():
        yield f"### {name[:1].upper()}{name[1:]} fine-tuned"
        yield markdown(["what", "parameters", "change explained", "held-out loss", "gain"], _rows(rows, part)).rstrip()
    yield "### What follows from it"
    yield "\n".join(_findings(part))


def _rows(rows: list[Row], part: dict[str, Any]) -> list[list[str]]:
    base, tuned = rows[0]["loss"], rows[1]["loss"]
    return [
        [
            row["name"],
            f"{row['parameters']:,}" if row["parameters"] else "",
            "" if row["share_explained"] is None else f"{row['share_explained']:.2%}",
            f"{row['loss']:.4f}",
            f"{gain(row, base, tuned):.1%}",
        ]
        for row in (*rows, part["trained"])
    ]


def gain(row: Row, base: float, tuned: float) -> float:
    """How much of the way from the base's loss to the tuned model's a row goes."""
    return (base - row["loss"]) / (base - tuned)


def _findings(part: dict[str, Any]) -> Iterator[str]:
    for name, rows in part["tunings"].items():
        base, tuned = rows[0]["loss"], rows[1]["loss"]
        road = [row for row in rows if row["name"].startswith("road")]
        by_weights = next(row for row in road if row["name"] == "road_2, weights")
        best = min(road, key=lambda row: row["loss"])
        rivals = [row for row in rows if row["name"].startswith("LoRA")]
        same, tenfold = (min(each, key=lambda row: row["loss"]) for each in (rivals[:2], rivals[2:]))
        harmful = [row["name"] for row in road if row["loss"] > base]
        gains = {
            each["name"]: f"{gain(each, base, tuned):.1%}"
            for each in (by_weights, best, same, tenfold, part["trained"])
        }
        yield _item(
            f"{name}: RoAd explains {by_weights['share_explained']:.2%} of the change of the weights, and buys "
            f"{gains[by_weights['name']]} of the gain; the best fit ({best['name']}) buys {gains[best['name']]}, "
            f"{same['name']} with about as many parameters {gains[same['name']]}, {tenfold['name']} with ten times as many "
            f"{gains[tenfold['name']]}. A RoAd adapter of the same size that is trained buys {gains[part['trained']['name']]}."
        )
        if harmful:
            yield _item(f"{name}: worse than the base model: {'; '.join(harmful)}.")
    inputs = 256
    yield _item(
        f"A change without any structure would be explained to 2 / {inputs} = {2 / inputs:.2%} in a layer of {inputs} inputs, "
        "by chance: two numbers for each row of so many. What full fine-tuning does to weights is hardly more of a rotation "
        "than that."
    )


def _streaming(part: dict[str, Any]) -> Iterator[str]:
    total, size = sum(part["model_bytes"].values()), part["size"]
    yield "## Memory, measured"
    yield _filled(
        f"A synthetic base of {part['model_bytes']['base'] / 1e9:.2f} GB in bfloat16 ({part['layers']} linear layers of "
        f"{size['hidden']} and {size['intermediate']} outputs) in {part['shards']['base']} shards of at most "
        f"{size['shard_bytes'] / 1e6:.0f} MB, and the same with every layer turned, in {part['shards']['tuned']} shards "
        "filled in the opposite order."
    )
    met = part["private_bytes_above"] <= part["bound_bytes"]
    rows = [
        ["private memory above the start, at most", f"{part['private_bytes_above'] / 1e6:.0f} MB"],
        [
            "bound: four times the largest pair of tensors",
            f"{part['bound_bytes'] / 1e6:.0f} MB, {'met' if met else 'not met'}",
        ],
        ["the largest pair of tensors", f"{part['pair_bytes'] / 1e6:.0f} MB"],
        [
            "time",
            f"{part['seconds']:.0f} s, {total / part['seconds'] / 1e9:.2f} GB/s of both models, read from the disk",
        ],
        ["change explained", f"{part['share_explained']:.3%}; the rest is bfloat16's rounding"],
        [
            "largest error of direct and cross",
            f"{part['largest_error']:.1e}; bfloat16 rounds by {2.0**-9:.1e} of a number",
        ],
    ]
    yield markdown(["what", "measured"], rows).rstrip()
    yield _filled(
        f"RssAnon of /proc/PID/status, read every millisecond ({part['samples']:,} times). The pages of the memory-mapped "
        "files are not in it: the system takes them back when it needs them."
    )


def _machine(record: Record) -> str:
    here = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    dirty = " with uncommitted changes" if record["dirty"] else ""
    return _filled(
        f"{here['processor']}, {here['cores']} cores, {here['threads']} threads; {versions}; commit {record['commit']}{dirty}, "
        f"{record['date']}. Made by `python -m benchmarks.fit`; `--report` makes this file from the record alone."
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, 138, break_long_words=False, break_on_hyphens=False)


def _item(text: str) -> str:
    return textwrap.fill(f"- {text}", 138, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
