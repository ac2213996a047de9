"""What a step of decoding costs when each of 32 rows has an adapter of its own: `python -m benchmarks.quality tenants`.

RoAd is served from a bank of roadie, LoRA by batched products of gathered matrices, as fast as plain torch has them. Other
methods have no batch of many adapters to be measured. All are interleaved in one process, on one thread, by the time that the
processor spends in it. The record is ``tenants.<model>.jsonl``, beside those of the runs.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

import roadie
from benchmarks.capacity import Option, random_adapter
from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.quality import records
from benchmarks.rivals import sharing_copy
from benchmarks.statistics import summarise
from benchmarks.workloads.bmm_lora import add_bmm_lora, assign
from benchmarks.workloads.model import DECODE, TARGETS
from benchmarks.workloads.real_model import Checkpoint, WholeCase, decode, load

ROWS, CONTEXT = 32, 32
BASE, TENANTS = "base", "tenants"
ROAD = {
    "road": Option((64,)),
    "road_input": Option((64,), (64,)),
    "road_stages_2": Option((2, 64)),
    "road_stages_3": Option((2, 16, 64)),
}
LORA = {f"lora_r{rank}": rank for rank in (1, 2, 4, 8, 16)}
SERVED_AS = {
    "road_1": "road",
    "road_2": "road",
    "road_4": "road",
    "road_1_input": "road_input",
    "road_4_input": "road_input",
    "road_1_stages_2": "road_stages_2",
    "road_2_stages_3": "road_stages_3",
    **{name: name for name in LORA},
}
"""What a method's step costs, whatever its variant: a bank keeps direct and cross."""


def record(model: Path, folder: Path, seconds: float = 60.0) -> Path:
    """Measure the steps of a checkpoint, and keep them in a file of `folder`, which replaces an older one."""
    base = load(Checkpoint(model.name, model), torch.float32)
    with threads(1):
        measured = of_model(base, Budget(seconds, 5, warm_up_calls=1, shortest_sample_s=0, processor_time=True))
    path = folder / f"{TENANTS}.{model.resolve().name}.jsonl"
    path.unlink(missing_ok=True)
    records.add(path, {"task": TENANTS, "model": model.resolve().name, **measured, **records.provenance()})
    return path


def of_model(base: nn.Module, budget: Budget) -> dict[str, Any]:
    """Median milliseconds of a step, and its ratio to that of the base model, by what is served."""
    case = WholeCase(DECODE, "fp32", ROWS, CONTEXT, 1)
    names = [f"a{row}" for row in range(ROWS)]
    steps: dict[str, Run] = {BASE: decode(base, case, None)}
    with ExitStack() as in_force, torch.no_grad():
        for name, option in ROAD.items():
            bank = roadie.AdapterBank(sharing_copy(base), slots=ROWS)
            bank.update({one: random_adapter(base, index, option) for index, one in enumerate(names)})
            in_force.enter_context(bank.rows(bank.slots(names)))
            steps[name] = decode(bank.model, case, None)
        for name, rank in LORA.items():
            lora = add_bmm_lora(sharing_copy(base), TARGETS, ROWS, rank)
            assign(lora, torch.arange(ROWS))
            steps[name] = decode(lora, case, None)
        rounds = measure(steps, budget)
    found = summarise(rounds, BASE, None)
    steps_of = {name: {"median_ms": one["median_ms"], "over_base": one["ratio"]} for name, one in found.items()}
    return {"rows": ROWS, "context": CONTEXT, "rounds": rounds.count, "steps": steps_of}
