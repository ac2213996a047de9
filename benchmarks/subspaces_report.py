"""docs/subspaces.md: a guide, and what the newest record of `benchmarks.subspaces` says."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.record import RESULTS
from benchmarks.tables import markdown

DOCUMENT = ROOT / "docs" / "subspaces.md"
GUIDE = Path(__file__).with_name("subspaces_guide.md")
Record = dict[str, Any]

ADAPTERS = {
    "base": "none: the base model",
    "half-A-contiguous": "half 1, trained on A",
    "half-B-contiguous": "half 2, trained on B",
    "both-contiguous": "both halves joined",
    "half-A-interleaved": "half 1 interleaved, trained on A",
    "half-B-interleaved": "half 2 interleaved, trained on B",
    "both-interleaved": "both interleaved halves joined",
    "full-A": "full, trained on A alone",
    "full-B": "full, trained on B alone",
    "full-A-then-B": "both full adapters, A first",
    "full-blended": "both full adapters, blended 0.5 and 0.5",
    "mixture": "full, trained on the mixture",
}


def path_of(record: Record) -> Path:
    """Where a record belongs."""
    return RESULTS / record["machine"]["name"] / f"subspaces-{record['commit']}.json"


def newest() -> Record:
    """The committed record with the latest date; raises FileNotFoundError where there is none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/subspaces-*.json")]
    if not records:
        raise FileNotFoundError(f"got no record in {RESULTS}; wanted one; run python -m benchmarks.subspaces")
    latest: Record = max(records, key=lambda record: record["date"])
    return latest


def write(record: Record) -> Path:
    """Write docs/subspaces.md."""
    DOCUMENT.write_text(text_of(record), encoding="utf-8")
    return DOCUMENT


def text_of(record: Record) -> str:
    """The document; equal for equal records."""
    variants = list(dict.fromkeys(entry["variant"] for entry in record["entries"]))
    parts = [GUIDE.read_text(encoding="utf-8"), _how(record), *(_results(record, variant) for variant in variants)]
    return "\n".join(part.rstrip() + "\n" for part in [*parts, _provenance(record)])


def _how(record: Record) -> str:
    settings = record["settings"]
    first, second = settings["kinds"]
    return _paragraph(
        f"Text A is `{first}` and text B `{second}`, two parts of the Python standard library that the embedded model never saw",
        f"(`roadie.embedded.corpus`). {settings['steps']} steps, {settings['rows']} rows of {settings['row_tokens']} tokens of",
        f"each text a step, learning rate {settings['learning_rate']:g} at its peak, all linear layers;",
        f"{len(settings['seeds'])} seeds, which decide the order of the rows. Everything of one seed was trained in one run.",
        f"Losses are nats a token on {settings['measured_rows']} held-out rows of each text: the mean over the seeds, lowest and",
        "highest in brackets. Parameters are those that differ from the identity's.",
    )


def _paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), width=140, break_on_hyphens=False) + "\n"


def _results(record: Record, variant: str) -> str:
    entries = [entry for entry in record["entries"] if entry["variant"] == variant]
    rows = [
        [title, _count(entries, name), *(_spread([e["losses"][name][text] for e in entries]) for text in "AB")]
        for name, title in ADAPTERS.items()
    ]
    table = markdown(["adapter", "parameters", "loss on A", "loss on B"], rows)
    return "\n".join([f"### {variant}\n", table, *_findings(entries)])


def _count(entries: list[Record], name: str) -> str:
    counts = [entry["parameters"].get(name, 0) for entry in entries]
    return f"{round(mean(counts)):,}"


def _spread(values: list[float], digits: int = 3) -> str:
    ends = [f"{value:.{digits}f}" for value in (mean(values), min(values), max(values))]
    return ends[0] if ends[1] == ends[2] else f"{ends[0]} ({ends[1]} to {ends[2]})"


def _findings(entries: list[Record]) -> Iterator[str]:
    """What the table says, in words that follow from its numbers."""
    yield "The gain of an adapter on a text is the base's loss less its own. Means over the seeds, lowest and highest:\n"
    yield markdown(
        ["share of a gain", "on A", "on B"],
        [
            [title, *(_spread([_gain(e, name(t), t) / _gain(e, of(t), t) for e in entries], 2) for t in "AB")]
            for title, name, of in _SHARES
        ],
    )
    yield from _verdicts(entries)


_SHARES = (
    ("a half alone, of the full adapter's", lambda t: f"half-{t}-contiguous", lambda t: f"full-{t}"),
    ("both halves joined, of the half's", lambda t: "both-contiguous", lambda t: f"half-{t}-contiguous"),
    ("both interleaved halves joined, of the half's", lambda t: "both-interleaved", lambda t: f"half-{t}-interleaved"),
    (
        "the other text's half, of the half's",
        lambda t: f"half-{_other(t)}-contiguous",
        lambda t: f"half-{t}-contiguous",
    ),
    ("both full adapters in turn, of the full adapter's", lambda t: "full-A-then-B", lambda t: f"full-{t}"),
    ("both full adapters blended, of the full adapter's", lambda t: "full-blended", lambda t: f"full-{t}"),
    ("the mixture's adapter, of the full adapter's", lambda t: "mixture", lambda t: f"full-{t}"),
)


def _other(text: str) -> str:
    return "B" if text == "A" else "A"


def _gain(entry: Record, name: str, text: str) -> float:
    losses: dict[str, dict[str, float]] = entry["losses"]
    return losses["base"][text] - losses[name][text]


def _verdicts(entries: list[Record]) -> Iterator[str]:
    for first, second, title in (
        ("both-contiguous", "base", "Both halves joined against the base model"),
        ("both-contiguous", "full-A-then-B", "Both halves joined against both full adapters in turn"),
        ("both-contiguous", "full-blended", "Both halves joined against both full adapters blended"),
        ("both-contiguous", "mixture", "Both halves joined against the mixture's adapter"),
    ):
        said = " and ".join(_compared(entries, first, second, text) for text in "AB")
        yield f"- {title}: {said}."


def _compared(entries: list[Record], first: str, second: str, text: str) -> str:
    differences = [e["losses"][first][text] - e["losses"][second][text] for e in entries]
    lower = sum(difference < 0 for difference in differences)
    return f"{mean(differences):+.3f} on {text} (lower with {lower} of {len(entries)} seeds)"


def _provenance(record: Record) -> str:
    where = record["machine"]
    versions = {name: where["versions"][name] for name in ("torch", "transformers")}
    dirty = " with uncommitted changes" if record["dirty"] else ""
    return _paragraph(
        f"{where['processor']}, {where['cores']} cores; Python {where['python']},",
        ", ".join(f"{name} {number}" for name, number in versions.items()) + ";",
        f"commit {record['commit']}{dirty}, {record['date']}; {record['seconds'] / 60:.0f} minutes.",
        "`python -m benchmarks.subspaces` measures anew and writes the record and this file; the guide above the results is",
        "`benchmarks/subspaces_guide.md`.",
    )
