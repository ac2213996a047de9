"""docs/many-adapters-results.md and its picture, made from the newest records of `benchmarks.bank` and nothing else.

python -m benchmarks.bank_report
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.tables import markdown

Entry = Mapping[str, Any]
DOCUMENT = machine.ROOT / "docs" / "many-adapters-results.md"
PICTURE = machine.ROOT / "docs" / "images" / "bank-growth.png"
LAYER_BOUND = {1: 0.015, 128: 0.01}
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito

_HEAD = """# One model, many adapters in one batch: what was measured

This file is made by `python -m benchmarks.bank_report` from the records `bank-*.json` in `benchmarks/results`, of each part the
newest; it is never written by hand. `python -m benchmarks.bank` measures anew, `python -m benchmarks.bank PART` a part.
Intervals are what the median of the ratios may be (95 %). The machine is shared, and its noise is in them.
"""


def main() -> None:
    """Write the document and its picture."""
    entries = newest(sorted((machine.ROOT / "benchmarks" / "results").glob("*/bank-*.json")))
    DOCUMENT.write_text(text_of(entries), encoding="utf-8")
    draw([entry for entry in entries if entry["what"] == "growth"], PICTURE)
    print(DOCUMENT.relative_to(machine.ROOT))


def newest(files: Sequence[Path]) -> list[Entry]:
    """The entries of the newest record of each part; records name the day and commit they are of."""
    records = sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda found: found["date"])
    of_part: dict[str, list[Entry]] = {}
    for record in records:
        found: dict[str, list[Entry]] = {}
        for entry in record["entries"]:
            made = {"commit": record["commit"][:10], "date": record["date"], "machine": record["machine"]}
            found.setdefault(entry["what"], []).append({**made, **entry})
        of_part |= found
    return [entry for entries in of_part.values() for entry in entries]


def text_of(entries: Sequence[Entry]) -> str:
    """The document; equal for equal records."""
    parts = {what: [entry for entry in entries if entry["what"] == what] for what in _SECTIONS}
    sections = [_HEAD]
    for what, found in parts.items():
        if found:
            title, section = _SECTIONS[what]
            dates = ", ".join(
                sorted({f"{entry['machine']}, {entry['date']}, commit {entry['commit']}" for entry in found})
            )
            sections.append(f"## {title}\n\n" + "\n".join(section(found)) + f"\n({dates})\n")
    return "\n".join(sections)


def _layer(entries: Sequence[Entry]) -> Iterator[str]:
    yield "128 rows that use 128 of 1000 resident adapters, 4096 x 4096: the adapter's time over the base layer's. Ours is the"
    yield "rotation of the layer's own output, with tables of the layer's dtype; PEFT's is the whole layer less the base layer.\n"
    rows = []
    for entry in entries:
        case, found = entry["case"], entry["adapter_over_base"]
        bound = LAYER_BOUND[case["tokens_a_row"]]
        verdict = "met" if found["roadie"]["value"] <= bound else "NOT met"
        row = [case["dtype"], str(case["tokens_a_row"]), _ratio(found["roadie"], 4), f"{bound} {verdict}"]
        rows.append([*row, *(f"{found[kind]:.3f}" for kind in ("PEFT RoAd", "PEFT LoRA r=8"))])
    yield markdown(["dtype", "tokens a row", "roadie", "bound", "PEFT RoAd", "PEFT LoRA r=8"], rows)


def _growth(entries: Sequence[Entry]) -> Iterator[str]:
    yield "The rotation of 128 rows of 4096 outputs in float32, whose adapters are drawn from all that are resident. The bytes"
    yield "that are moved grow until every row has an adapter of its own; after that only distance in memory does.\n"
    for entry in entries:
        rows = [
            [count, f"{found['median_ms']:.3f}", _ratio(found["ratio"], 2), f"{found['bytes_moved'] / 2**20:.1f}"]
            for count, found in entry["rivals"].items()
        ]
        yield f"{entry['case']['tokens_a_row']} token(s) a row:\n"
        yield markdown(["resident", "ms", "over 1000 resident", "MiB moved"], rows)
    yield "Bound from 1000 to 10,000: 1.5.\n"
    yield f"![Time of the rotation as more adapters are resident](images/{PICTURE.name})\n"


def _model(entries: Sequence[Entry]) -> Iterator[str]:
    yield "A Llama of 160M parameters, random weights, float32, all linear layers adapted, 64 rows with 64 adapters: time over"
    yield "the same model without adapters. Bound for roadie: 1.05.\n"
    names = list(entries[0]["rivals"])
    rows = [
        [entry["case"]["mode"], str(entry["rounds"]), f"{entry['rivals']['base']['median_ms']:.0f}"]
        + [_ratio(entry["rivals"][name]["ratio"], 3) for name in names if name != "base"]
        for entry in entries
    ]
    yield markdown(["step", "rounds", "base, ms", *(name for name in names if name != "base")], rows)


def _memory(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        found, rates = entry["bytes_an_adapter"], entry["admissions_a_second"]
        case = entry["case"]
        yield f"{case['adapters']:,} road_1 adapters of all linear layers of the 160M model, tables in {case['dtype']}:\n"
        rows = [[kind, f"{value / 1000:.1f}", f"{value / found['computed']:.3f}"] for kind, value in found.items()]
        yield markdown(["bytes an adapter", "kB", "over computed"], rows)
        yield markdown(["admitted from", "a second"], [[kind, f"{rate:.0f}"] for kind, rate in rates.items()])


def _stress(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        yield f"{entry['seconds']:.0f} s in which one thread admitted and replaced adapters {entry['admissions']:,} times while"
        yield "another ran rows:"
        yield f"{entry['rows_checked']:,} rows were checked, {entry['wrong']} were wrong.\n"


def _blends(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        ratio = _ratio(entry["rivals"]["blends"]["ratio"], 3)
        yield "128 rows, each a blend of two adapters that was asked for before, over 128 rows of one adapter each:"
        yield f"{ratio}. Making the 128 blends when they were first asked for took {entry['making_them_all_ms']:.0f} ms.\n"


_SECTIONS = {
    "layer": ("One layer", _layer),
    "growth": ("More adapters resident", _growth),
    "model": ("A whole model", _model),
    "blends": ("Blends", _blends),
    "memory": ("Ten thousand adapters", _memory),
    "stress": ("Admission while rows run", _stress),
}


def _ratio(found: Mapping[str, float], digits: int) -> str:
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Time and bytes over the number of resident adapters; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for entry, colour in zip(entries, COLOURS, strict=False):
        counts = [int(count) for count in entry["rivals"]]
        times = [found["median_ms"] for found in entry["rivals"].values()]
        moved = [found["bytes_moved"] for found in entry["rivals"].values()]
        tokens = entry["case"]["tokens_a_row"]
        axes.plot(counts, times, "o-", color=colour, label=f"{tokens} token(s) a row")
        axes.plot(
            counts, [times[0] * b / moved[0] for b in moved], ":", color=colour, label="as the bytes that are moved"
        )
    axes.set(xscale="log", yscale="log", xlabel="adapters resident", ylabel="ms for 128 rows of 4096 outputs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
