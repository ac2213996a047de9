"""How long a report on 100 adapters takes. ``python -m benchmarks.looking``

Adapters of a Llama of 160M parameters (12 layers of 7 linear layers, hidden size 768, intermediate size 2048), of six families,
are saved, and ``roadie inspect`` writes the page in a new process, several times: from starting Python to the page on the disk.
Prints a table and writes benchmarks/results/<machine>/looking-<commit>.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.record import RESULTS, write
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.rotation import Variant, parameter_size

ADAPTERS, LAYERS, FAMILIES, RUNS = 100, 12, 6, 3
WANTED_S = 20.0
OUTPUTS = {
    "q_proj": 768,
    "k_proj": 768,
    "v_proj": 768,
    "o_proj": 768,
    "gate_proj": 2048,
    "up_proj": 2048,
    "down_proj": 768,
}


def path_of(depth: int, kind: str) -> str:
    """The module's path in a Llama."""
    return f"model.layers.{depth}.{'mlp' if kind in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{kind}"


def save_adapters(folder: Path, variant: Variant) -> list[Path]:
    """100 adapters: what a family shares, and as much of its own."""
    places = [
        (path_of(depth, kind), parameter_size(variant, n)) for depth in range(LAYERS) for kind, n in OUTPUTS.items()
    ]
    config = {
        "variant": variant.value,
        "group_size": 64,
        "target_modules": "all-linear",
        "base_model_name_or_path": "llama-160m",
    }
    paths = []
    for number in range(ADAPTERS):
        family, own = (torch.Generator().manual_seed(seed) for seed in (number % FAMILIES, 1000 + number))
        layers = {}
        for place, size in places:
            theta = 0.05 * (torch.randn(size, generator=family) + torch.randn(size, generator=own))
            layers[place] = LayerParameters(theta, 1 + 0.02 * torch.randn(size, generator=own), variant, 64)
        paths.append(folder / f"family{number % FAMILIES}-member{number}")
        checkpoint.save(Adapter(layers, config), paths[-1])
    return paths


def timed(paths: list[Path], page: Path) -> dict[str, float]:
    """One run of the command, by the clock and by the processor."""
    command = [sys.executable, "-m", "roadie.cli", "inspect", *map(str, paths), "--output", str(page)]
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": wall, "processor_s": processor, "page_bytes": page.stat().st_size}


def told(runs: list[dict[str, float]]) -> str:
    """The runs in a line."""
    least, middle, most = sorted(run["wall_s"] for run in runs)
    size = f"page {runs[0]['page_bytes'] / 2**20:.1f} MiB"
    return f"{middle:.1f} s, median of {RUNS} ({least:.1f} to {most:.1f}), of {WANTED_S:.0f} wanted; {size}"


def main() -> None:
    """Measure both variants, print, record."""
    entries: list[dict[str, Any]] = []
    for variant in (Variant.ROAD_1, Variant.ROAD_2):
        with tempfile.TemporaryDirectory() as folder:
            paths = save_adapters(Path(folder), variant)
            runs = [timed(paths, Path(folder) / "report.html") for _ in range(RUNS)]
        entries.append({"variant": variant.value, "adapters": ADAPTERS, "runs": runs})
        print(f"{variant.value}: {told(runs)}")
    made = machine.commit()
    record = {"machine": machine.machine_name(), **made, "torch": torch.__version__, "entries": entries}
    print(write(record, RESULTS / machine.machine_name() / f"looking-{made['commit']}.json").relative_to(machine.ROOT))


if __name__ == "__main__":
    main()
