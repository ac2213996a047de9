"""The bounds that roadie is built for, each held against a record.

A bound counts as met when the end of the interval that is nearer to it meets it: the lower end for "at most", the upper
end for "at least". So "met" says that the measurement does not contradict the bound, and "NOT MET" that it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.rivals import FROZEN, PEFT_IA3, PEFT_LORA, PEFT_ROAD, ROADIE
from benchmarks.workloads import kept, real_model
from benchmarks.workloads.layer import FORWARD
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import DECODE, TRAINING, ModelSize
from benchmarks.workloads.rotation import COPY, PEFT_APPLY, PEFT_APPLY_FP32

Entry = dict[str, Any]
THEIRS = (PEFT_ROAD, PEFT_LORA, PEFT_IA3)
ITEMSIZE = {"fp32": 4, "bf16": 2, "bf16, fp32 adapter": 2}
LIMIT_S = 15 * 60
# Of a whole model on one thread, time over the frozen model's. Decoding: by rows of one adapter; training: by tokens.
DECODING = {1: 1.03, 8: 1.02, 32: 1.02}
MIXED_DECODING = 1.05
RESIDENTS = 1.06
STEP = {64: 1.10, 256: 1.05, 1024: 1.03}
ABOVE_FLOOR = 1.3  # what a training step may cost instead: this times what rotating as a pass of its own would


@dataclass(frozen=True)
class Verdict:
    """One bound: its line, what it is about, the bound, what was measured, its interval, and whether it is met."""

    line: int
    about: str
    bound: str
    measured: str
    interval: str
    met: bool


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """All verdicts that the entries of a record allow, by line."""
    entries = record["entries"]
    found = [
        *of_whole_models(record),
        *_bytes_kept(entries),
        *_layers(entries),
        *_rotations(entries),
        *_models(entries),
        *_compiled(entries),
        _duration(record),
    ]
    return sorted(found, key=lambda verdict: verdict.line)


def of_workload(entries: list[Entry], workload: str) -> list[Entry]:
    """The entries of one workload, in the order of the record."""
    return [entry for entry in entries if entry["workload"] == workload]


def _at_most(line: int, about: str, bound: float, ratio: dict[str, float], what: str = "") -> Verdict:
    return Verdict(
        line, about, f"{what}at most {bound:g}", f"{ratio['value']:.3f}", interval(ratio), ratio["low"] <= bound
    )


def _at_least(line: int, about: str, bound: float, ratio: dict[str, float], what: str = "") -> Verdict:
    return Verdict(
        line, about, f"{what}at least {bound:g}", f"{ratio['value']:.3g}", interval(ratio), ratio["high"] >= bound
    )


def interval(ratio: dict[str, float]) -> str:
    """``1.002 to 1.013``."""
    return (
        f"{ratio['low']:.3g} to {ratio['high']:.3g}"
        if ratio["high"] >= 10
        else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
    )


def inverted(ratio: dict[str, float]) -> dict[str, float]:
    """The interval of the inverse ratio."""
    return {"value": 1 / ratio["value"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}


def of_whole_models(record: dict[str, Any]) -> list[Verdict]:
    """Line 1: a whole model's time, and that no rival's is below it."""
    found = []
    for entry in whole_models(record["entries"]):
        bound, about = bound_of(entry), title_of(entry)
        if bound is not None:
            found.append(_at_most(1, about, bound, entry["rivals"][ROADIE]["ratio"]))
        if entry["case"]["threads"] == 1 and any(name in entry["rivals"] for name in THEIRS):
            found.append(_no_rival_faster(1, about, entry))
    return found


def whole_models(entries: list[Entry]) -> list[Entry]:
    """The entries of whole models: of a checkpoint, then those with many residents; like steps beside each other."""
    found = [entry for kind in (real_model.CHECKPOINT, real_model.RESIDENTS) for entry in of_workload(entries, kind)]
    return sorted(found, key=_kind_of_step)


def _kind_of_step(entry: Entry) -> tuple[Any, ...]:
    case = entry["case"]
    return (entry["workload"], case["adapters"], case["mode"], case["threads"], case["rows"], case["tokens"])


def bound_of(entry: Entry) -> float | None:
    """What roadie may cost in an entry of a whole model, over the frozen model; None where nothing is said of it."""
    case = entry["case"]
    if case["threads"] != 1:
        return None
    if entry["workload"] == real_model.RESIDENTS:
        return RESIDENTS
    if case["adapters"] > 1:
        return MIXED_DECODING if case["mode"] == DECODE else None
    if case["mode"] == DECODE:
        return DECODING.get(case["rows"])
    bound = STEP.get(case["rows"] * case["tokens"])
    return None if bound is None else max(bound, round(1 + ABOVE_FLOOR * (floor_of(entry) - 1), 3))


def floor_of(entry: Entry) -> float:
    """The ratio to the frozen model if the rotation were a pass of its own over memory."""
    return entry["limit_ms"] / entry["rivals"][entry["base"]]["median_ms"]


def title_of(entry: Entry) -> str:
    """``decode, fp32, 32 rows of 32 adapters, 1 thread``."""
    case = entry["case"]
    rows = f"{case['rows']} row{'s' * (case['rows'] > 1)}"
    rows += f" x {case['tokens']} tokens" if case["mode"] == TRAINING else ""
    rows += f" of {case['adapters']} adapters" if case["adapters"] > 1 else ""
    return f"{case['mode']}, {case['precision']}, {rows}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def _bytes_kept(entries: list[Entry], *, compiled: bool = False) -> Iterator[Verdict]:
    """Line 2 (and, compiled, the second half of line 6)."""
    for entry in of_workload(entries, "kept"):
        case = entry["case"]
        if (case["mode"] != "eager") != compiled or case["what"] == kept.RELU:
            continue
        for name, amount in entry["bytes"].items():
            if not name.startswith(ROADIE):
                continue
            free = name.endswith("road_1") and case["what"] in (kept.SILU, kept.MLP)
            bound = 0 if free else ITEMSIZE[case["precision"]]
            line, how = (6, f", {case['mode']}") if compiled else (2, "")
            measured = amount["per_element"]
            about = f"{case['what']}, {case['precision']}, {name}{how}"
            yield Verdict(
                line, about, f"at most {bound} B an element", f"{measured:g}", "exact", measured <= bound + 1e-9
            )


def _layers(entries: list[Entry]) -> Iterator[Verdict]:
    """Line 3."""
    for entry in of_workload(entries, "layer"):
        case = entry["case"]
        bound, fewest = {FORWARD: (1.02, 8), LAYER_TRAINING: (1.04, 64)}[case["mode"]]
        if case["out_features"] != 4096 or case["tokens"] < fewest:
            continue
        about = f"{case['mode']}, {case['precision']}, {case['tokens']} tokens"
        yield _at_most(3, about, bound, entry["rivals"][ROADIE]["ratio"])
        yield _no_rival_faster(3, about, entry)


def _no_rival_faster(line: int, about: str, entry: Entry) -> Verdict:
    rivals = {name: entry["rivals"][name]["ratio_to_roadie"] for name in THEIRS if name in entry["rivals"]}
    name, ratio = min(rivals.items(), key=lambda item: item[1]["high"])
    about = f"{about}: fastest rival over roadie ({name})"
    return Verdict(line, about, "no rival faster", f"{ratio['value']:.3f}", interval(ratio), ratio["high"] >= 1)


def _rotations(entries: list[Entry]) -> Iterator[Verdict]:
    """Line 4."""
    for entry in of_workload(entries, "rotation"):
        case = entry["case"]
        if (case["tokens"], case["out_features"], case["threads"]) != (4096, 4096, 1):
            continue
        share = inverted(entry["rivals"][ROADIE]["ratio"])
        yield _at_least(4, f"{case['precision']}: share of the bandwidth of {COPY}", 0.7, share)
        for name in (PEFT_APPLY, PEFT_APPLY_FP32):
            if name in entry["rivals"]:
                about = f"{case['precision']}: {name} over roadie"
                yield _at_least(4, about, 15, entry["rivals"][name]["ratio_to_roadie"])


def _models(entries: list[Entry]) -> Iterator[Verdict]:
    """Line 5."""
    for entry in of_workload(entries, "model"):
        case, rivals = entry["case"], entry["rivals"]
        if case["mode"] != TRAINING or case["size"] != asdict(ModelSize()):
            continue  # toy sizes are no measure: their time is that of calling functions
        about = f"training step, {case['precision']}"
        yield _at_most(5, f"{about}: time", 1.05, rivals[ROADIE]["ratio"])
        amounts = entry["bytes"]
        more = amounts[ROADIE] / amounts[FROZEN]
        yield Verdict(5, f"{about}: activations kept", "at most 1.3", f"{more:.3f}", "exact", more <= 1.3)
        for name in (PEFT_LORA, PEFT_ROAD):
            ratio = rivals[name]["ratio_to_roadie"]
            yield _at_least(5, f"{about}: time of {name} over roadie", 1, ratio)
            share = amounts[name] / amounts[ROADIE]
            yield Verdict(5, f"{about}: kept by {name} over roadie", "more than 1", f"{share:.3f}", "exact", share > 1)


def _compiled(entries: list[Entry]) -> Iterator[Verdict]:
    """Line 6: an entry is there only if the whole module was compiled as one graph; a break raises instead."""
    yield from _bytes_kept(entries, compiled=True)
    for entry in of_workload(entries, "kept"):
        case = entry["case"]
        if case["mode"] != "eager":
            about = f"{case['what']}, {case['precision']}, {case['mode']}: graph breaks"
            yield Verdict(6, about, "0", "0", "exact", True)


def _duration(record: dict[str, Any]) -> Verdict:
    seconds = record["duration_s"]
    about = f"make bench on {record['machine']['cores']} cores, without whole models"
    return Verdict(7, about, "at most 15 min", f"{seconds / 60:.1f} min", "one run", seconds <= LIMIT_S)
