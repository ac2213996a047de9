"""The tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.rivals import ROADIE
from benchmarks.verdicts import bound_of, floor_of, of_workload
from benchmarks.workloads.rotation import COPY

Entry = dict[str, Any]
MIB = 2**20


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned so that it can be read in a terminal too."""
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)]) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def whole_models(entries: list[Entry]) -> str:
    """A step of a whole model a line: rows and tokens down, rivals across, and the bound of roadie with one adapter a row."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["rivals"]))
    rows = []
    for entry in entries:
        case = entry["case"]
        what = [case["mode"], case["precision"], f"{case['rows']} x {case['tokens']}"]
        counts = [str(case[key]) for key in ("adapters", "threads")]
        rows.append([*what, *counts, *timed(entry, names), _bound(entry), *_last(entry)])
    header = ["step", "precision", "rows x tokens", "adapters", "threads", *_headings(names)]
    return markdown([*header, "roadie's bound", "limit", "rounds"], rows)


def _bound(entry: Entry) -> str:
    bound = bound_of(entry)
    if bound is None:
        return ""
    return f"{bound:.3g}: {'met' if entry['rivals'][ROADIE]['ratio']['low'] <= bound else '**not met**'}"


def layers(entries: list[Entry]) -> Iterator[str]:
    """A table for each mode and size: precision and tokens down, rivals across."""
    found = of_workload(entries, "layer")
    for mode, in_features, out_features in dict.fromkeys(_size(entry) for entry in found):
        of_size = [entry for entry in found if _size(entry) == (mode, in_features, out_features)]
        names = list(dict.fromkeys(name for entry in of_size for name in entry["rivals"]))
        rows = [
            [entry["case"]["precision"], str(entry["case"]["tokens"]), *timed(entry, names), *_last(entry)]
            for entry in of_size
        ]
        header = ["precision", "tokens", *_headings(names), "limit", "rounds"]
        yield f"### {mode}, {in_features} to {out_features}\n\n{markdown(header, rows)}"


def _size(entry: Entry) -> tuple[str, int, int]:
    case = entry["case"]
    return case["mode"], case["in_features"], case["out_features"]


def _headings(names: Sequence[str]) -> list[str]:
    return [f"{names[0]}, ms (quartiles)", *names[1:]]


def timed(entry: Entry, names: Sequence[str]) -> list[str]:
    """The base's time, and each rival's ratio to it."""
    rivals = entry["rivals"]
    return [_time(rivals[names[0]]), *(_ratio(rivals.get(name)) for name in names[1:])]


def _last(entry: Entry) -> list[str]:
    """The ratio a pass of its own over memory would have, and the number of rounds."""
    return [f"{floor_of(entry):.3f}", str(entry["rounds"])]


def _time(rival: dict[str, Any]) -> str:
    return f"{_ms(rival['median_ms'])} ({_ms(rival['q1_ms'])} to {_ms(rival['q3_ms'])})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(rival: dict[str, Any] | None) -> str:
    if rival is None:
        return ""
    ratio = rival["ratio"]
    digits = 2 if ratio["value"] < 10 else 0
    digits += ratio["high"] < 2
    return f"{ratio['value']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def rotations(entries: list[Entry]) -> str:
    """GB/s of copying and of each rival."""
    found = of_workload(entries, "rotation")
    names = list(dict.fromkeys(name for entry in found for name in entry["rivals"]))
    rows = []
    for entry in found:
        case = entry["case"]
        cells = [_speed(entry, name) for name in names]
        rows.append([case["precision"], str(case["tokens"]), str(case["threads"]), *cells, str(entry["rounds"])])
    header = [
        "precision",
        "tokens x 4096",
        "threads",
        *(f"{name}, GB/s (time over {COPY})" for name in names),
        "rounds",
    ]
    return markdown(header, rows)


def _speed(entry: Entry, name: str) -> str:
    rival = entry["rivals"].get(name)
    if rival is None:
        return ""
    return f"{bytes_per_s(entry, name) / 1e9:.1f} ({rival['ratio']['value']:.2f})"


def bytes_per_s(entry: Entry, name: str) -> float:
    """Bytes that must move over the median time."""
    return entry["bytes_moved"] / (entry["rivals"][name]["median_ms"] * 1e-3)


def kept(entries: list[Entry]) -> str:
    """Bytes an element for each module, precision and mode."""
    found = of_workload(entries, "kept")
    names = list(dict.fromkeys(name for entry in found for name in entry["bytes"]))
    rows = []
    for entry in found:
        case, amounts = entry["case"], entry["bytes"]
        cells = [f"{amounts[name]['per_element']:.3g}" if name in amounts else "" for name in names]
        rows.append([case["what"], case["precision"], case["mode"], *cells])
    return markdown(["modules", "precision", "mode", *names], rows)


def models(entries: list[Entry]) -> Iterator[str]:
    """Time of each phase, then the activations kept."""
    found = of_workload(entries, "model")
    if not found:
        return
    names = list(found[0]["rivals"])
    rows = []
    for entry in found:
        case = entry["case"]
        what = f"{case['rows']} x {case['tokens']}"
        rows.append([case["mode"], case["precision"], what, *timed(entry, names), *_last(entry)])
    yield markdown(["phase", "precision", "rows x tokens", *_headings(names), "limit", "rounds"], rows)
    yield "Activations kept for backward in the training step, MiB (over the frozen model's):\n"
    kept_rows = [[e["case"]["precision"], *amounts(e["bytes"], names)] for e in found if "bytes" in e]
    yield markdown(["precision", *names], kept_rows)


def peaks(entries: list[Entry]) -> str:
    """How far the resident memory rises, in MiB."""
    found = of_workload(entries, "peak")
    if not found:
        return ""
    names = list(found[0]["bytes"])
    rows = []
    for entry in found:
        case = entry["case"]
        layer = case.get("what") == "layer"
        what = f"layer 4096 to {case['out_features']}, {case['tokens']} tokens" if layer else "whole model"
        rows.append([what, case["precision"], *amounts(entry["bytes"], names)])
    return markdown(["what", "precision", *(f"{name}, MiB" for name in names)], rows)


def amounts(amounts: dict[str, int], names: Sequence[str]) -> list[str]:
    base = amounts[names[0]]
    return [f"{amounts[name] / MIB:.1f} ({amounts[name] / base:.2f})" for name in names]
