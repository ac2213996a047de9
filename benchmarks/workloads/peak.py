"""The peak memory of a training step, each rival in a process of its own, so that none uses what another left behind.

python -m benchmarks.workloads.peak '{"rival": "roadie", "precision": "fp32", ...}'    what a case starts
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.memory import peak_bytes
from benchmarks.rivals import RIVALS
from benchmarks.workloads import layer
from benchmarks.workloads.layer import LayerCase
from benchmarks.workloads.model import ModelCase, ModelSize, rivals_of, training_step


def run(case: ModelCase, layers: list[LayerCase], names: tuple[str, ...] = RIVALS) -> list[dict[str, Any]]:
    """The record's entries: bytes by rival, of the model's training step and of each layer's forward and backward."""
    peaks = {name: _in_a_process(case, layers, name) for name in names}
    entries = [{"workload": "peak", "case": asdict(case), "bytes": {name: peaks[name][0] for name in names}}]
    for index, one in enumerate(layers, start=1):
        case_of_layer = {"what": "layer", **asdict(one)}
        found = {name: peaks[name][index] for name in names}
        entries.append({"workload": "peak", "case": case_of_layer, "bytes": found})
    return entries


def _in_a_process(case: ModelCase, layers: list[LayerCase], rival: str) -> list[int]:
    order = {"rival": rival, "model": asdict(case), "layers": [asdict(one) for one in layers]}
    command = [sys.executable, "-m", "benchmarks.workloads.peak", json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the peak of {rival} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_here(order: dict[str, Any]) -> list[int]:
    """The peaks of one rival in this process: the layers' first, while the process is small; given after the model's."""

    peaks = [_layer_peak(LayerCase(**one), order["rival"]) for one in order["layers"]]
    case = ModelCase(**{**order["model"], "size": ModelSize(**order["model"]["size"])})
    return [_model_peak(case, order["rival"]), *peaks]


def _layer_peak(case: LayerCase, rival: str) -> int:
    once = layer.runs(case, (rival,))[rival]
    layer.runs(LayerCase(**{**asdict(case), "tokens": 1}), (rival,))[rival]()  # code that is loaded at the first call
    return peak_bytes(once)


def _model_peak(case: ModelCase, rival: str) -> int:
    model = rivals_of(case, (rival,))[rival]
    training_step(model, ModelCase(**{**asdict(case), "size": case.size, "rows": 1, "tokens": 2}))()
    return peak_bytes(training_step(model, case))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(peaks_here(json.loads(sys.argv[1]))) + "\n")
