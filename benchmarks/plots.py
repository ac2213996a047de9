"""The plots of docs/performance.md: images/performance-*.png.

Colours are Okabe and Ito's, which people with every kind of colour vision can tell apart; markers differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.gpu import report as gpu_report
from benchmarks.rivals import AGAIN, FROZEN, PEFT_IA3, PEFT_LORA, PEFT_ROAD, ROADIE, ROADIE_STAGES
from benchmarks.tables import MIB, bytes_per_s
from benchmarks.verdicts import of_workload, whole_models
from benchmarks.workloads.adapters import BMM_LORA
from benchmarks.workloads.model import TRAINING
from benchmarks.workloads.real_model import CHECKPOINT
from benchmarks.workloads.rotation import COPY, PEFT_APPLY, PEFT_APPLY_FP32

Entry = dict[str, Any]
STYLES = {
    ROADIE: ("#D55E00", "o"),
    ROADIE_STAGES: ("#F0A875", "o"),
    PEFT_ROAD: ("#0072B2", "s"),
    PEFT_LORA: ("#009E73", "^"),
    PEFT_IA3: ("#CC79A7", "D"),
    FROZEN: ("#000000", "."),
    AGAIN: ("#999999", "."),
    COPY: ("#000000", "."),
    PEFT_APPLY: ("#0072B2", "s"),
    PEFT_APPLY_FP32: ("#56B4E9", "v"),
    BMM_LORA: ("#E69F00", "v"),
    gpu_report.ROADIE_NAMED: ("#F0A875", "o"),
}


def draw(record: dict[str, Any], gpu: dict[str, Any] | None, folder: Path) -> list[Path]:
    """Draw every plot the entries allow; gives their files."""
    entries = record["entries"]
    makers = {CHECKPOINT: _checkpoint, "layer": _layers, "rotation": _roofline, "model": _models}
    drawn = [make(of_workload(entries, name), folder) for name, make in makers.items() if of_workload(entries, name)]
    if gpu is None or not gpu_report.figure(gpu["entries"]):
        return drawn
    return [*drawn, adapters_plot(gpu, folder / gpu_report.FIGURE)]


def _checkpoint(entries: list[Entry], folder: Path) -> Path:
    """Bars: time over the frozen model, by step, of models with one adapter on one thread."""
    found = [e for e in whole_models(entries) if (e["case"]["threads"], e["case"]["adapters"]) == (1, 1)]
    names = (ROADIE, ROADIE_STAGES, PEFT_ROAD, PEFT_LORA, PEFT_IA3)
    figure, panel = plt.subplots(figsize=(11, 4))
    labels = [f"{e['case']['mode']}\n{_amount(e['case'])}\n{e['case']['precision']}" for e in found]
    _bars(panel, labels, {name: [entry["rivals"][name]["ratio"] for entry in found] for name in names})
    panel.set_ylabel("time over the frozen model, one thread")
    panel.set_ylim(bottom=0.9)
    panel.set_title(entries[0]["model"], fontsize=10)
    return _finish(figure, panel, folder / "performance-checkpoint.png")


def _amount(case: dict[str, Any]) -> str:
    return f"{case['rows'] * case['tokens']} tokens" if case["mode"] == TRAINING else f"{case['rows']} rows"


def _layers(entries: list[Entry], folder: Path) -> Path:
    """A panel for each mode (rows) and precision (columns): ratio against tokens, 4096 outputs."""
    entries = [entry for entry in entries if entry["case"]["out_features"] == 4096]
    modes, precisions = (list(dict.fromkeys(entry["case"][key] for entry in entries)) for key in ("mode", "precision"))
    size = (4.2 * len(precisions), 3.4 * len(modes))
    figure, panels = plt.subplots(len(modes), len(precisions), figsize=size, squeeze=False, sharex=True, sharey="row")
    for row, mode in enumerate(modes):
        for column, precision in enumerate(precisions):
            of_panel = [e for e in entries if (e["case"]["mode"], e["case"]["precision"]) == (mode, precision)]
            _ratio_panel(panels[row][column], of_panel, title=f"{mode}, {precision}")
        panels[row][0].set_ylabel("time over the frozen layer")
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    return _finish(figure, panels[0][0], folder / "performance-layer.png")


def _ratio_panel(panel: Any, entries: list[Entry], title: str) -> None:
    tokens = [entry["case"]["tokens"] for entry in entries]
    for name in (PEFT_ROAD, PEFT_LORA, PEFT_IA3, ROADIE):
        ratios = [entry["rivals"][name]["ratio"] for entry in entries]
        _line(panel, name, tokens, ratios)
    limits = [entry["limit_ms"] / entry["rivals"][FROZEN]["median_ms"] for entry in entries]
    panel.plot(tokens, limits, color="black", linestyle=":", label="limit: a pass over memory")
    panel.axhline(1, color="black", linewidth=0.8, label="frozen layer")
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens, [str(count) for count in tokens])
    panel.set_title(title, fontsize=10)


def _line(panel: Any, name: str, x: Sequence[float], values: Sequence[dict[str, float]]) -> None:
    """A line with its intervals as bars."""
    colour, marker = STYLES[name]
    middle = [value["value"] for value in values]
    bars = [
        [value["value"] - value["low"] for value in values],
        [value["high"] - value["value"] for value in values],
    ]
    panel.errorbar(
        x, middle, yerr=bars, color=colour, marker=marker, markersize=5, capsize=2, linewidth=1.4, label=name
    )


def _roofline(entries: list[Entry], folder: Path) -> Path:
    """A panel for each precision: bytes a second against the bytes of the tensor, one thread."""
    entries = [entry for entry in entries if entry["threads"] == 1]
    precisions = list(dict.fromkeys(entry["case"]["precision"] for entry in entries))
    figure, panels = plt.subplots(1, len(precisions), figsize=(5.2 * len(precisions), 3.8), squeeze=False, sharey=True)
    for panel, precision in zip(panels[0], precisions, strict=True):
        of_panel = [entry for entry in entries if entry["case"]["precision"] == precision]
        tokens = [entry["case"]["tokens"] for entry in of_panel]
        for name in of_panel[0]["rivals"]:
            colour, marker = STYLES[name]
            speeds = [bytes_per_s(entry, name) / 1e9 for entry in of_panel]
            label = "copy (the roofline)" if name == COPY else name
            style = ":" if name == COPY else "-"
            panel.plot(tokens, speeds, color=colour, marker=marker, linestyle=style, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        labels = [f"{entry['case']['tokens']}\n{entry['bytes_moved'] / 2 / MIB:.3g} MiB" for entry in of_panel]
        panel.set_xticks(tokens, labels)
        panel.set_title(f"rotation in place, {precision}, one thread", fontsize=10)
        panel.set_xlabel("tokens (x 4096), size of the tensor")
    panels[0][0].set_ylabel("read + written, GB/s")
    return _finish(figure, panels[0][-1], folder / "performance-roofline.png")


def _models(entries: list[Entry], folder: Path) -> Path:
    """Bars: time over the frozen model by phase and precision, and the activations of a training step."""
    names = (ROADIE, PEFT_ROAD, PEFT_LORA, PEFT_IA3)
    figure, (times, amounts) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    labels = [f"{entry['case']['mode']}\n{entry['case']['precision']}" for entry in entries]
    _bars(times, labels, {name: [entry["rivals"][name]["ratio"] for entry in entries] for name in names})
    times.set_ylabel("time over the frozen model")
    training = [entry for entry in entries if "bytes" in entry]
    shares = {name: [_exact(entry["bytes"][name] / entry["bytes"][FROZEN]) for entry in training] for name in names}
    _bars(amounts, [entry["case"]["precision"] for entry in training], shares)
    amounts.set_ylabel("activations kept, over the frozen model's")
    return _finish(figure, times, folder / "performance-model.png")


def _exact(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def _bars(panel: Any, labels: Sequence[str], values: dict[str, list[dict[str, float]]]) -> None:
    width = 0.8 / len(values)
    for index, (name, of_name) in enumerate(values.items()):
        places = [place + (index - (len(values) - 1) / 2) * width for place in range(len(labels))]
        heights = [value["value"] for value in of_name]
        spread = [[v["value"] - v["low"] for v in of_name], [v["high"] - v["value"] for v in of_name]]
        panel.bar(places, heights, width, yerr=spread, capsize=2, color=STYLES[name][0], label=name)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(labels)), labels, fontsize=8)


def adapters_plot(record: dict[str, Any], path: Path) -> Path:
    """The paper's figure: tokens a second against the number of different adapters in the batch; graphs are dashed."""
    lines = gpu_report.figure(record["entries"])
    counts = sorted({count for line in lines.values() for count, _ in line})
    picture, panel = plt.subplots(figsize=(8.6, 4.4))
    for name, line in lines.items():
        colour, marker = STYLES[name.removesuffix(gpu_report.GRAPH)]
        style = "--" if name.endswith(gpu_report.GRAPH) else "-"
        panel.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=style, label=name)
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("different adapters in the batch")
    panel.set_ylabel("decoded tokens a second")
    panel.set_title(record["machine"]["name"], fontsize=10)
    return _finish(picture, panel, path)


def _finish(figure: Any, panel: Any, path: Path) -> Path:
    """One legend below all panels, light grids, and the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path
