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
ONE, BOUND, INPUT_BOUND = "64", 1.02, 1.05

_HEAD = """# More capacity: what it costs to serve

This file is made by `python -m benchmarks.capacity_report` from the records `capacity-*.json` in `benchmarks/results`, of each
part the newest; it is never written by hand. `python -m benchmarks.capacity` measures anew. Options are named by the group sizes
of their rotations, of each layer's output and, where it says so, of its input; "64" is plain RoAd. Ratios are medians over
interleaved rounds, with the 95 % interval of that median. The machine is shared, and its noise is in them.
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
    yield f"Bounds of a decode step, of plain RoAd: {BOUND} for rotations in a row, {INPUT_BOUND} for one of the input besides."
    yield "Limit: the ratio if nothing but the bytes of tables counted that plain RoAd does not read, at the speed at which"
    yield "memory is copied.\n"
    head = [
        "step",
        "option",
        "ms, median and quartiles",
        "over plain RoAd",
        "over the base",
        "tables, MB",
        "limit",
        "bound",
        "rounds",
    ]
    yield markdown(head, [_row(entry, name) for entry in entries for name in entry["over_single"]])
    for entry in entries:
        yield f"Memory is copied at {entry['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written).{_missed(entry)}\n"


def _row(entry: Entry, name: str) -> list[str]:
    found, over_base = entry["over_single"][name], entry["over_base"][name]
    times = f"{found['median_ms']:.0f} ({found['q1_ms']:.0f} to {found['q3_ms']:.0f})"
    ratios = [_ratio(found["ratio"]), _ratio(over_base["ratio"])]
    table_bytes = entry["table_bytes"].get(name)
    tables = ["", ""] if table_bytes is None else [f"{table_bytes / 1e6:.0f}", f"{limit_of(entry, name):.3f}"]
    return [entry["case"]["mode"], name, times, *ratios, *tables, _verdict(entry, name), str(entry["rounds"])]


def limit_of(entry: Entry, name: str) -> float:
    """The ratio to plain RoAd if an option cost no more than reading its tables' further bytes."""
    further = entry["table_bytes"][name] - entry["table_bytes"][ONE]
    single_s = entry["over_single"][ONE]["median_ms"] * 1e-3
    return 1 + float(further / entry["copy_bytes_per_s"] / single_s)


def _bound(entry: Entry, name: str) -> float | None:
    """What a decode step of the option may cost; None where nothing is asked."""
    if entry["case"]["mode"] != "decode" or name == ONE or name not in entry["table_bytes"]:
        return None
    return INPUT_BOUND if "input" in name else BOUND


def _verdict(entry: Entry, name: str) -> str:
    bound = _bound(entry, name)
    if bound is None:
        return ""
    return f"{bound} {'met' if entry['over_single'][name]['ratio']['value'] <= bound else 'NOT met'}"


def _missed(entry: Entry) -> str:
    missed = [name for name in entry["over_single"] if "NOT" in _verdict(entry, name)]
    return f" Not within its bound: {'; '.join(missed)}." if missed else ""


def _layer(entries: Sequence[Entry]) -> Iterator[str]:
    yield "64 rows that use 64 adapters, 4096 x 4096, one thread, tables of the layer's dtype: the rotations' time over the base"
    yield "layer's, as a bank makes them right after it, and in new memory right before it where the input is rotated.\n"
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
