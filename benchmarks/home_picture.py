"""The documentation's first picture, wide and narrow, from the committed records: ``python -m benchmarks.home_picture``.

Left, measured: a decode step of a real model over the number of tenants in its batch. Right, computed: their memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import machine
from benchmarks.rivals import PEFT_LORA, PEFT_ROAD, ROADIE
from benchmarks.scale import SHAPES, lora_bytes, table_bytes

RESULTS = machine.ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
IMAGES = machine.ROOT / "docs" / "images"
PICTURES = {
    IMAGES / "tenants.svg": 2,
    IMAGES / "tenants-narrow.svg": 1,
}  # panels beside each other: on a telephone, one
COLOURS = {ROADIE: "#D55E00", PEFT_LORA: "#009E73", PEFT_ROAD: "#0072B2"}
SHAPE = "8B"
TENANTS = (1, 10, 100, 1_000, 10_000)


def steps(results: Path = RESULTS) -> dict[str, dict[int, float]]:
    """A decode step of SmolLM2-135M over that of its base, by method and tenants: rows of one adapter each, on one thread."""
    newest = max(results.glob("20*.json"))
    found: dict[str, dict[int, float]] = {ROADIE: {}, PEFT_LORA: {}, PEFT_ROAD: {}}
    for entry in json.loads(newest.read_text(encoding="utf-8"))["entries"]:
        tenants = tenants_of(entry)
        for method in found if tenants else ():
            found[method][tenants] = entry["rivals"][method]["ratio"]["value"]
    return found


def tenants_of(entry: Mapping[str, Any]) -> int:
    """How many tenants a measured step of the real model has, 0 where it is something else."""
    case = entry["case"]
    is_step = "SmolLM2" in str(entry.get("model")) and case.get("mode") == "decode" and case["threads"] == 1
    return case["rows"] if is_step and case["adapters"] >= case["rows"] else 0


def batched_lora(results: Path = RESULTS) -> tuple[int, float]:
    """Tenants, and the step of LoRA r=8 by batched products of gathered matrices: the rival that a good server has."""
    record = json.loads(next((results / "quality-real").glob("tenants.*.jsonl")).read_text(encoding="utf-8"))
    return record["rows"], record["steps"]["lora_r8"]["over_base"]["value"]


def memory() -> dict[str, list[float]]:
    """GB of resident adapters of a model of `SHAPE`, in bfloat16, for each of `TENANTS`."""
    shape = next(each for each in SHAPES if each.name == SHAPE)
    sizes = {ROADIE: table_bytes(shape, "bfloat16"), PEFT_LORA: lora_bytes(shape, 8)}
    return {method: [size * count / 1e9 for count in TENANTS] for method, size in sizes.items()}


def draw(path: Path, across: int = 2) -> None:
    plt.rcParams.update({"svg.hashsalt": "roadie", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    figure, (left, right) = plt.subplots(2 // across, across, figsize=(4.5 * across, 6.8 / across))
    for method, ratios in steps().items():
        label = {ROADIE: "roadie (RoAd)"}.get(method, method)
        left.plot(list(ratios), list(ratios.values()), marker="o", color=COLOURS[method], label=label)
    tenants, ratio = batched_lora()
    left.plot([tenants], [ratio], "^", color=COLOURS[PEFT_LORA], mfc="none", label="LoRA r=8, batched products")
    _finish(
        left, "tenants in the batch, a row each", "decode step, times the base model's", "Measured: SmolLM2-135M, CPU"
    )
    left.set_ylim(0.9, 4.9)  # room for the legend above the lines
    for method, sizes in memory().items():
        label = {ROADIE: "roadie (RoAd, any variant)"}.get(method, "LoRA r=8")
        right.plot(TENANTS, sizes, marker="o", color=COLOURS[method], label=label)
    right.set_xscale("log")
    right.set_yscale("log")
    _finish(right, "adapters in memory", "GB, bfloat16", f"Computed: a model of {SHAPE}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _finish(panel: Any, across: str, up: str, title: str) -> None:
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    for picture, panels in PICTURES.items():
        draw(picture, panels)
        print(picture.relative_to(machine.ROOT))
