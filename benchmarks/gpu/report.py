"""The part of docs/performance.md that is about a GPU, made from its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.plan import MIXED, ONE
from benchmarks.rivals import PEFT_LORA, ROADIE
from benchmarks.tables import amounts, markdown, timed
from benchmarks.verdicts import interval, inverted, of_workload
from benchmarks.workloads.layer import INFERENCE
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING

Entry = dict[str, Any]
Record = dict[str, Any]
FIGURE, GRAPH = "performance-gpu-adapters.png", ", graph"
ROADIE_NAMED = "roadie, adapter_names"  # in every step, where "roadie" was told once
_HOW = """"bound" is what roadie may cost: the base's time, and 1.3 times what the rotation needs, its bytes at the speed of
copying on this device and 2 us for each kernel. "graph" is the same work as a CUDA graph, without the host between the kernels.
Where nothing is trained adapters are frozen, as loaded for inference; "roadie, trainable" is one that is not. Ratios are to the
frozen model. "rows() once": the rows' adapters are named around all steps, and not in each.
"""


def section(record: Record) -> Iterator[str]:
    """Paragraphs and tables; of a run that was killed, those of what it did."""
    entries, machine = record["entries"], record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    speed = machine["device_copy_bytes_per_s"] / 1e9
    yield f"{machine['name']}, commit {record['commit']}, {record['date']}, {versions}; it copies {speed:.0f} GB/s.\n"
    yield from (_checked(name, counts) for name, counts in record["checks"].items())
    yield "".join(f"- {failure['task']} failed: {failure['error']}\n" for failure in record["failures"])
    left_out = Counter(title.partition(":")[0] for title in record["left_out"])
    yield "".join(f"- {step}: {count} left out, the time was over\n" for step, count in left_out.items())
    yield from _aims(entries)
    if figure(entries):
        yield f"![Tokens a second against adapters in the batch](images/{FIGURE})\n"
    yield _HOW
    yield from _layers(of_workload(entries, "layer"))
    yield from _decoding(of_workload(entries, "decoding"))
    yield from _training(of_workload(entries, "training"))


def _checked(name: str, counts: dict[str, Any]) -> str:
    said = ", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "skipped"))
    what = {"kernels": "Kernels against float64", "tests": "Tests on the device"}[name]
    worst = counts.get("largest_error_in_bounds")
    return f"- {what}: {said}" + (f"; the largest error is {worst:.2f} of what rounding can do\n" if worst else "\n")


@dataclass(frozen=True)
class Aim:
    """What roadie is built for on GPUs: a ratio to the frozen model, or to LoRA, and what was measured."""

    about: str
    at_most: float
    ratio: dict[str, float]

    @property
    def is_met(self) -> bool:
        """As other bounds: where the end of the interval nearer to it meets it."""
        return self.ratio["low"] <= self.at_most


def aims(entries: Sequence[Entry]) -> Iterator[Aim]:
    """Of each entry that one is about."""
    for entry in entries:
        case, ours = entry["case"], entry["rivals"].get(ROADIE)
        if ours is None:
            continue
        kind = entry["workload"]
        if kind == "layer" and case["tokens"] == 4096:
            at_most = {INFERENCE: 1.03, LAYER_TRAINING: 1.10}[case["mode"]]
            about = f"layer, {case['mode']}, {case['in_features']} to {case['out_features']}, {case['tokens']} tokens"
            yield Aim(f"{about}{GRAPH * case['graph']}", at_most, ours["ratio"])
        if kind == "decoding" and case["how"] == MIXED and case["graph"]:
            yield Aim(f"{_step(case)}{GRAPH}", 1.15, ours["ratio"])
        if (
            entry["workload"] == "decoding"
            and case["how"] == ONE
            and not case["graph"]
            and PEFT_LORA in entry["rivals"]
        ):
            over_lora = inverted(entry["rivals"][PEFT_LORA]["ratio_to_roadie"])
            yield Aim(f"{_step(case)}, over {PEFT_LORA}", 1.0, over_lora)


def _step(case: dict[str, Any]) -> str:
    return f"decoding, {case['model']}, rows: {case['rows']}, adapters: {case['adapters']}"


def _aims(entries: list[Entry]) -> Iterator[str]:
    found = list(aims(entries))
    rows = [
        [a.about, f"{a.at_most:g}", f"{a.ratio['value']:.3f}", interval(a.ratio), "met" if a.is_met else "**NOT MET**"]
        for a in found
    ]
    if rows:
        yield "### What it is built for there\n"
        yield markdown(["what", "at most", "measured", "interval", "verdict"], rows)


def _layers(entries: list[Entry]) -> Iterator[str]:
    def kind(entry: Entry) -> tuple[str, int, int]:
        return entry["case"]["mode"], entry["case"]["in_features"], entry["case"]["out_features"]

    for mode, in_features, out_features in dict.fromkeys(map(kind, entries)):
        of_kind = [entry for entry in entries if kind(entry) == (mode, in_features, out_features)]
        yield f"### A layer, {mode}, {in_features} to {out_features}\n\n{_table(of_kind, ['tokens', 'graph'])}"


def _decoding(entries: list[Entry]) -> Iterator[str]:
    for name in dict.fromkeys(entry["case"]["model"] for entry in entries):
        of_model = [entry for entry in entries if entry["case"]["model"] == name]
        keys = ["rows", "adapters", "how", "graph"]
        context = of_model[0]["case"]["context"]
        yield f"### Decoding, {name}, {context} tokens in the cache\n\n{_table(sorted(of_model, key=_order), keys)}"


def _order(entry: Entry) -> tuple[Any, ...]:
    case = entry["case"]
    return case["rows"], case["how"] != ONE, case["adapters"], case["graph"], case["how"]


def _training(entries: list[Entry]) -> Iterator[str]:
    if not entries:
        return
    yield f"### A training step\n\n{_table(entries, ['model', 'rows', 'tokens'])}"
    for key, what in (
        ("bytes", "Kept between forward and backward, MiB (over the frozen model's):"),
        ("peak_bytes", "How far the memory rises above where it was, MiB (over the frozen model's):"),
    ):
        with_bytes = [entry for entry in entries if key in entry]
        if with_bytes:
            names = list(with_bytes[0][key])
            rows = [[entry["case"]["model"], *amounts(entry[key], names)] for entry in with_bytes]
            yield f"{what}\n\n{markdown(['model', *names], rows)}"


def _table(entries: list[Entry], keys: list[str]) -> str:
    """The named parts of the cases down, and the rivals across, whichever an entry has."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["rivals"]))
    rows = [[*(_cell(e["case"][key]) for key in keys), *timed(e, names), _bound(e)] for e in entries]
    table = markdown([*keys, f"{names[0]}, ms (quartiles)", *names[1:], "bound"], rows)
    refused = {name: why for entry in entries for name, why in entry.get("refused", {}).items()}
    return table + "".join(f"\n{name} cannot be captured: {why}\n" for name, why in refused.items())


def _cell(value: object) -> str:
    return {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)


def _bound(entry: Entry) -> str:
    ours = entry["rivals"].get(ROADIE)
    ratio = entry["bound_ms"] / entry["rivals"][entry["base"]]["median_ms"]
    if ours is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f}: {'met' if ours['ratio']['low'] <= ratio else '**not met**'}"


def figure(entries: Sequence[Entry]) -> dict[str, list[tuple[int, float]]]:
    """The lines of the paper's figure: for each rival the number of different adapters, and tokens a second.

    Of the model that was decoded with most numbers of adapters. Rows are named once, and in every step where a rival says so.
    """
    found = [entry for entry in of_workload(list(entries), "decoding") if entry["case"]["how"] != ONE]
    if not found:
        return {}
    names = [entry["case"]["model"] for entry in found]
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in found:
        case = entry["case"]
        if case["model"] != max(names, key=names.count):
            continue
        for name, times in entry["rivals"].items():
            line = lines.setdefault(name + GRAPH * case["graph"], [])
            if case["adapters"] not in [count for count, _ in line]:  # the frozen model is in all of them
                line.append((case["adapters"], case["rows"] / (times["median_ms"] * 1e-3)))
    return {name: sorted(line) for name, line in lines.items()}
