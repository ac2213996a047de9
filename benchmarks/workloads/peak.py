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


def run(models: list[ModelCase], layers: list[LayerCase], names: tuple[str, ...] = RIVALS) -> list[dict[str, Any]]:
    """The record's entries: bytes by rival, of each layer's forward and backward and of each model's training step."""
    cases = [{"what": "layer", **asdict(one)} for one in layers] + [{"what": "model", **asdict(one)} for one in models]
    peaks = {name: _in_a_process(cases, name) for name in names}
    return [
        {"workload": "peak", "case": case, "bytes": {name: peaks[name][index] for name in names}}
        for index, case in enumerate(cases)
    ]


def _in_a_process(cases: list[dict[str, Any]], rival: str) -> list[int]:
    command = [sys.executable, "-m", "benchmarks.workloads.peak", json.dumps({"rival": rival, "cases": cases})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"measuring the peak of {rival} failed: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_here(rival: str, cases: list[dict[str, Any]]) -> list[int]:
    """The peaks of one rival in this process, one case after the other; freed memory is given back in between."""
    return [_peak(rival, **case) for case in cases]


def _peak(rival: str, what: str, **case: Any) -> int:
    if what == "layer":
        return _layer_peak(LayerCase(**case), rival)
    return _model_peak(ModelCase(**{**case, "size": ModelSize(**case["size"])}), rival)


def _layer_peak(case: LayerCase, rival: str) -> int:
    once = layer.runs(case, (rival,))[rival]
    layer.runs(LayerCase(**{**asdict(case), "tokens": 1}), (rival,))[rival]()  # code that is loaded at the first call
    return peak_bytes(once)


def _model_peak(case: ModelCase, rival: str) -> int:
    model = rivals_of(case, (rival,))[rival]
    training_step(model, ModelCase(**{**asdict(case), "size": case.size, "rows": 1, "tokens": 2}))()
    return peak_bytes(training_step(model, case))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(peaks_here(**json.loads(sys.argv[1]))) + "\n")
