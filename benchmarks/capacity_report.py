"""docs/capacity-results.md, made from the newest records of `benchmarks.capacity` and nothing else.

python -m benchmarks.capacity_report
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.bank_report import Entry, newest
from benchmarks.tables import markdown

DOCUMENT = machine.ROOT / "docs" / "capacity-results.md"
ONE, BOUND = "64", 1.02

_HEAD = """# Rotations in a row: what they cost to serve

This file is made by `python -m benchmarks.capacity_report` from the records `capacity-*.json` in `benchmarks/results`, of each
part the newest; it is never written by hand. `python -m benchmarks.capacity` measures anew. Options are named by the group sizes
of their rotations; "64" is plain RoAd. Ratios are medians over interleaved rounds, with the 95 % interval of that median. The
machine is shared, and its noise is in them.
"""


def main() -> None:
    """Write the document."""
    DOCUMENT.write_text(text_of(newest(records())), encoding="utf-8")
    print(DOCUMENT.relative_to(machine.ROOT))


def records() -> list[Path]:
    """The records there are."""
    return sorted((machine.ROOT / "benchmarks" / "results").glob("*/capacity-*.json"))


def text_of(entries: Sequence[Entry]) -> str:
    """The document; equal for equal records."""
    sections = [_HEAD]
    for what, (title, section) in _SECTIONS.items():
        found = [entry for entry in entries if entry["what"] == what]
        if found:
            made = sorted({f"{entry['machine']}, {entry['date']}, commit {entry['commit']}" for entry in found})
            sections.append(f"## {title}\n\n" + "\n".join(section(found)) + f"\n({', '.join(made)})\n")
    return "\n".join(sections)


def _model(entries: Sequence[Entry]) -> Iterator[str]:
    yield "A Llama of 160M parameters, random weights, float32, all linear layers adapted, 64 rows with 64 adapters. Time over"
    yield "that of plain RoAd, and over the model without adapters."
    yield f"Bound of rotations in a row in a decode step: {BOUND} of plain RoAd.\n"
    rows = []
    for entry in entries:
        over_one, over_base = entry["over_single"], entry["over_base"]
        for name, found in over_one.items():
            is_bound = entry["case"]["mode"] == "decode" and name not in ("base", ONE) and "PEFT" not in name
            verdict = ("met" if found["ratio"]["value"] <= BOUND else "NOT met") if is_bound else ""
            times = f"{found['median_ms']:.0f} ({found['q1_ms']:.0f} to {found['q3_ms']:.0f})"
            ratios = [_ratio(found["ratio"]), _ratio(over_base[name]["ratio"])]
            rows.append([entry["case"]["mode"], name, times, *ratios, verdict, str(entry["rounds"])])
    head = ["step", "option", "ms, median and quartiles", "over plain RoAd", "over the base", "bound", "rounds"]
    yield markdown(head, rows)


def _layer(entries: Sequence[Entry]) -> Iterator[str]:
    yield "64 rows that use 64 adapters, 4096 x 4096, one thread, tables of the layer's dtype: the rotations' time over the base"
    yield "layer's before them, as a bank makes them.\n"
    names = list(entries[0]["rotations_over_layer"])
    rows = [
        [entry["case"]["dtype"], str(entry["case"]["tokens_a_row"])]
        + [_ratio(entry["rotations_over_layer"][name], 4) for name in names]
        for entry in entries
    ]
    yield markdown(["dtype", "tokens a row", *names], rows)


_SECTIONS = {"decode": ("A decode step", _model), "prefill": ("Prefill", _model), "layer": ("One layer", _layer)}


def _ratio(found: Mapping[str, float], digits: int = 3) -> str:
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


if __name__ == "__main__":
    main()
