"""Where a rival is faster or leaner than roadie, whether or not a bound speaks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.rivals import ROADIE
from benchmarks.verdicts import THEIRS, interval, of_workload, title_of, whole_models

Entry = dict[str, Any]
VARIANT = " road_1"  # the one that is compared where an entry has all of them


@dataclass(frozen=True)
class Loss:
    """What is compared, who wins, and the rival's share of roadie's time or bytes."""

    what: str
    rival: str
    share: str


def losses(record: dict[str, Any]) -> list[Loss]:
    """Every rival whose time is below roadie's outside its interval, or whose bytes are fewer."""
    entries = record["entries"]
    return [*_in_time(entries), *_in_bytes_kept(entries), *_in_peak(entries)]


def _in_time(entries: list[Entry]) -> Iterator[Loss]:
    for entry in entries:
        for name in THEIRS:
            ratio = entry.get("rivals", {}).get(name, {}).get("ratio_to_roadie")
            if ratio is not None and ratio["high"] < 1:
                yield Loss(f"time: {_title(entry)}", name, f"{ratio['value']:.3f} ({interval(ratio)})")


def _in_bytes_kept(entries: list[Entry]) -> Iterator[Loss]:
    for entry in of_workload(entries, "kept"):
        amounts = {name.removesuffix(VARIANT): amount["per_element"] for name, amount in entry["bytes"].items()}
        what = f"bytes kept, an element: {_title(entry)}"
        yield from _fewer(what, amounts)
    for entry in of_workload(entries, "model"):
        if "bytes" in entry:
            yield from _fewer(f"bytes kept: {_title(entry)}", entry["bytes"])


def _in_peak(entries: list[Entry]) -> Iterator[Loss]:
    for entry in of_workload(entries, "peak"):
        yield from _fewer(f"peak memory: {entry['case']['what']}, {_title(entry)}", entry["bytes"])


def _fewer(what: str, amounts: dict[str, float]) -> Iterator[Loss]:
    for name in THEIRS:
        if name in amounts and amounts[name] < amounts[ROADIE]:
            yield Loss(what, name, f"{amounts[name] / amounts[ROADIE]:.3f}")


def _title(entry: Entry) -> str:
    case = entry["case"]
    if whole_models([entry]):
        return title_of(entry)
    if entry["workload"] == "kept":
        return f"{case['what']}, {case['precision']}, {case['mode']}"
    size = f"{case['tokens']} tokens"
    if "out_features" in case:
        size += f" x {case['out_features']}"
    return f"{case['mode']}, {case['precision']}, {size}"
