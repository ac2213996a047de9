"""The rotation alone, in place, against copying as many bytes and against PEFT's ``_apply_road``.

Copying is the roofline: like the rotation in place it reads each element once and writes it once. Both are measured in
the same rounds, on warm buffers of the same size. alpha is 1, so that thousands of rotations leave the numbers what they
were. PEFT's function gets PEFT's parameters and makes direct and cross of them in each call, as it does in a model; with
float32 parameters and bfloat16 activations it is surrounded by the two conversions of PEFT's forward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.road.layer import _apply_road
from torch import Tensor

from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.rivals import GROUP_SIZE, PRECISIONS, ROADIE, Precision
from benchmarks.workloads import entry
from roadie.kernels import rotate_
from roadie.rotation import from_parameters

COPY, PEFT_APPLY, PEFT_APPLY_FP32 = "copy", "PEFT _apply_road", "PEFT _apply_road, fp32 adapter"


@dataclass(frozen=True)
class RotationCase:
    """A tensor of tokens x out_features in one dtype ("fp32" or "bf16")."""

    precision: str
    tokens: int
    out_features: int = 4096
    threads: int = 1


def run(case: RotationCase, budget: Budget) -> dict[str, Any]:
    """Time rotating in place, copying, and PEFT's function."""
    with threads(case.threads):
        rounds = measure(runs(case), budget)
        moved = 2 * case.tokens * case.out_features * PRECISIONS[case.precision].base.itemsize
        return entry("rotation", asdict(case), rounds, base=COPY, ours=ROADIE, bytes_moved=moved)


def runs(case: RotationCase) -> dict[str, Run]:
    """What each rival does once."""
    precision = PRECISIONS[case.precision]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.out_features, generator=generator).to(precision.base)
    theta = torch.randn(case.out_features // 2, generator=generator) * 0.5
    rotation = from_parameters(theta, torch.ones_like(theta), "road_1", GROUP_SIZE)
    ours, source, target = x.clone(), x.clone(), x.clone()
    rivals: dict[str, Run] = {
        COPY: lambda: target.copy_(source),
        ROADIE: lambda: rotate_(ours, rotation),
        PEFT_APPLY: peft_rotation(x, theta, precision),
    }
    if precision.base == torch.bfloat16:
        rivals[PEFT_APPLY_FP32] = peft_rotation(x, theta, PRECISIONS["bf16, fp32 adapter"])
    return rivals


def peft_rotation(x: Tensor, theta: Tensor, precision: Precision) -> Run:
    """PEFT's own function on PEFT's own parameters, out of place, as PEFT's forward calls it."""
    assert _apply_road.__module__ == "peft.tuners.road.layer"
    theta = theta.to(precision.adapter)
    alpha = torch.ones_like(theta)

    def once() -> Tensor:
        with torch.no_grad():
            return _apply_road("road_1", GROUP_SIZE, theta, alpha, x.to(precision.adapter)).to(x.dtype)

    return once
