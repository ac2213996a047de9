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
    "both-halved": "both halves joined, at the strength 0.5",
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
    results = [_results(record, variant) for variant in variants]
    guide, entries = GUIDE.read_text(encoding="utf-8"), record["entries"]
    parts = [guide, _how(record), _shortfall(entries), *results, _provenance(record)]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


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


def _paragraph(*parts: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(parts), width=140, break_on_hyphens=False, subsequent_indent=indent) + "\n"


def _shortfall(entries: list[Record]) -> str:
    """Where joining costs something, and why; nothing where it does not."""
    texts = [text for text in "AB" if all(_gain(entry, "both-contiguous", text) < 0 for entry in entries)]
    if not texts:
        return ""
    pairs = [(entry, text) for entry in entries for text in "AB"]
    is_harmful = all(_gain(entry, f"half-{_other(text)}-contiguous", text) < 0 for entry, text in pairs)
    why = (
        ": each half by itself makes the other text worse, and what they do adds up in the hidden states. That no pair is shared"
        " does not keep one task from disturbing the other"
    )
    return _paragraph(
        f"**What falls short.** Joined at full strength the halves are worse than the base model on {' and '.join(texts)},",
        f"with every variant and seed{why if is_harmful else ''}. The comparisons below each table say what does better.",
        "Tasks that do not pull in opposite directions, as in the paper, were not measured here.",
    )


def _other(text: str) -> str:
    return "B" if text == "A" else "A"


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
            [title, *(_spread([_share_of_gain(e, adapter, measure, text) for e in entries], 2) for text in "AB")]
            for title, adapter, measure in _SHARES
        ],
    )
    yield from _verdicts(entries)


# What is said, the adapter, and the one whose gain is the measure; {t} is the text and {o} the other one.
_SHARES = (
    ("a half alone, of the full adapter's", "half-{t}-contiguous", "full-{t}"),
    ("both halves joined, of the half's", "both-contiguous", "half-{t}-contiguous"),
    ("both interleaved halves joined, of the half's", "both-interleaved", "half-{t}-interleaved"),
    ("both halves joined at 0.5, of the half's", "both-halved", "half-{t}-contiguous"),
    ("the other text's half, of the half's", "half-{o}-contiguous", "half-{t}-contiguous"),
    ("both full adapters in turn, of the full adapter's", "full-A-then-B", "full-{t}"),
    ("both full adapters blended, of the full adapter's", "full-blended", "full-{t}"),
    ("the mixture's adapter, of the full adapter's", "mixture", "full-{t}"),
)


def _share_of_gain(entry: Record, adapter: str, measure: str, text: str) -> float:
    found, full = (name.format(t=text, o=_other(text)) for name in (adapter, measure))
    return _gain(entry, found, text) / _gain(entry, full, text)


def _gain(entry: Record, name: str, text: str) -> float:
    losses: dict[str, dict[str, float]] = entry["losses"]
    return losses["base"][text] - losses[name][text]


def _verdicts(entries: list[Record]) -> Iterator[str]:
    for first, second, title in (
        ("both-contiguous", "base", "Both halves joined against the base model"),
        ("both-halved", "base", "Both halves joined at 0.5 against the base model"),
        ("both-contiguous", "full-A-then-B", "Both halves joined against both full adapters in turn"),
        ("both-halved", "full-blended", "Both halves joined at 0.5 against both full adapters blended 0.5 and 0.5"),
        ("both-contiguous", "mixture", "Both halves joined against the mixture's adapter"),
    ):
        said = " and ".join(_compared(entries, first, second, text) for text in "AB")
        yield _paragraph(f"- {title}: {said}.", indent="  ").rstrip()


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
