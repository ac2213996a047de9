"""What adapters cost on a device: layers, decoding, a training step; and how fast the device copies, which bounds are made of.

Adapters are frozen where nothing is trained, as one is that was loaded for inference; "roadie, trainable" is one that is not.
"graph": the same kernels as a CUDA graph, without the host between them; on a CPU they run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import nn

import roadie
from benchmarks.gpu.plan import MIXED, NAMED, NAMED_PEFT, ONE
from benchmarks.gpu.report import ROADIE_NAMED
from benchmarks.gpu.setting import Entry, Setting
from benchmarks.harness import Budget, Run, measure
from benchmarks.machine import commit, describe
from benchmarks.rivals import FROZEN, GROUP_SIZE, PEFT_LORA, PEFT_ROAD, ROADIE, ROADIE_TRAINABLE, sharing_copy
from benchmarks.statistics import summarise
from benchmarks.workloads import adapters, entry, model
from benchmarks.workloads import layer as one_layer
from benchmarks.workloads.adapters import BMM_LORA
from benchmarks.workloads.decoding import captured
from benchmarks.workloads.layer import INFERENCE, LayerCase
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import TARGETS, TRAINING, ModelCase, ModelSize
from roadie.testing import random_adapter

PRECISION = "bf16"
RIVALS = (FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA)
# The kernels that an adapted layer needs: one forward; and one for R^T g with sums over rows, one that makes gradients of them.
KERNELS = {INFERENCE: 1, LAYER_TRAINING: 3}
TABLE_BYTES = 2 * 4  # direct and cross of an output, in float32
COMPARED = {
    ONE: (FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA),
    MIXED: (FROZEN, ROADIE, BMM_LORA),
    NAMED: (FROZEN, ROADIE, PEFT_LORA),
    NAMED_PEFT: (FROZEN, PEFT_ROAD),
}


def machine(setting: Setting) -> list[Entry]:
    """Processor, versions, and the device's name."""
    import triton

    made = describe(setting.device)
    made["versions"]["triton"] = triton.__version__
    return [{"workload": "machine", "machine": made, "commit": commit()}]


def copying(setting: Setting) -> list[Entry]:
    """Bytes read plus bytes written a second: 1 GiB on a GPU."""
    nbytes = 2**30 if setting.device == "cuda" else 2**20
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=setting.device) for _ in range(2))
    rounds = measure({"copy": lambda: target.copy_(source)}, Budget(0.5), _synchronise(setting))
    speed = 2 * nbytes / (summarise(rounds, "copy", None)["copy"]["median_ms"] * 1e-3)
    return [{"workload": "copying", "bytes_per_s": speed}]


def layer(
    setting: Setting, in_features: int, out_features: int, tokens: int, training: bool, graph: bool, seconds: float
) -> list[Entry]:
    """One linear layer, forward or forward and backward."""
    case = LayerCase(LAYER_TRAINING if training else INFERENCE, PRECISION, out_features, tokens, in_features)
    names = RIVALS if training else (FROZEN, ROADIE, ROADIE_TRAINABLE, PEFT_ROAD, PEFT_LORA)
    runs = one_layer.runs(case, names, setting.device)
    cost = {"moved": one_layer.bytes_moved(case), "kernels": KERNELS[case.mode]}
    return [_timed(setting, "layer", asdict(case), runs, seconds, graph=graph, **cost)]


def decoding(
    setting: Setting, size: str, rows: int, context: int, adapters: int, how: str, graph: bool, seconds: float
) -> list[Entry]:
    """One token a row; how: the rows say which adapters they use (see `plan`). All rows' worth of adapters are resident."""
    resident = 1 if how == ONE else rows
    models = _models(setting, ModelSize(**setting.sizes[size]), resident, how)
    frozen = models[FROZEN]
    case = {"model": size, "rows": rows, "adapters": adapters, "how": how, "context": context, "precision": PRECISION}
    with torch.no_grad(), _rows(models, rows, adapters, how):
        runs = {_said(name, how): _step(name, each, rows, adapters, context, how) for name, each in models.items()}
        cost = {"moved": _bytes_decoding(frozen, rows, how), "kernels": len(model.widths(frozen)) * KERNELS[INFERENCE]}
        return [_timed(setting, "decoding", case, runs, seconds, graph=graph, **cost)]


def training(setting: Setting, size: str, rows: int, tokens: int, seconds: float) -> list[Entry]:
    """Forward with a loss, and backward; how far the memory rises, and what is kept between the two."""
    case = ModelCase(TRAINING, PRECISION, rows, tokens, size=ModelSize(**setting.sizes[size]))
    models = model.rivals_of(case, RIVALS, setting.device)
    runs = {name: model.once(each, case) for name, each in models.items()}
    kernels = len(model.widths(models[FROZEN])) * KERNELS[LAYER_TRAINING]
    named = {"model": size, "mode": TRAINING, "precision": PRECISION, "rows": rows, "tokens": tokens}
    cost = {"moved": model.bytes_moved(case, models[FROZEN]), "kernels": kernels}
    made = _timed(setting, "training", named, runs, seconds, graph=False, **cost)
    made["bytes"] = {name: model.activations_kept(each, case) for name, each in models.items()}
    if setting.device == "cuda":
        made["peak_bytes"] = {name: _peak(run) for name, run in runs.items()}
    return [made]


def _timed(
    setting: Setting, workload: str, case: dict[str, Any], runs: dict[str, Run], seconds: float,
    *, graph: bool, moved: int, kernels: int,
) -> Entry:  # fmt: skip
    refused: dict[str, str] = {}
    if graph:
        runs, refused = _as_graphs(setting, runs)
    shortest_s = 5e-3 if setting.device == "cuda" else 50e-6
    budget = Budget(seconds, min_rounds=5, warm_up_calls=3, shortest_sample_s=shortest_s)
    rounds = measure(runs, budget, _synchronise(setting))
    made = entry(workload, {**case, "graph": graph}, rounds, base=FROZEN, ours=ROADIE, bytes_moved=moved)
    return {**made, "kernels": kernels, **({"refused": refused} if refused else {})}


def _as_graphs(setting: Setting, runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs that can be captured, and why others cannot; raises where it is the base that cannot."""
    if setting.device != "cuda":
        return runs, {}
    graphs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run)
        except Exception as error:
            if name == FROZEN:
                raise
            refused[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            torch.cuda.synchronize()
    return graphs, refused


def _models(setting: Setting, size: ModelSize, resident: int, how: str) -> dict[str, nn.Module]:
    """What is compared; where rows are named once, roadie's model is one that a bank serves."""
    made = {
        name: _model(setting.device, size, name, resident) for name in COMPARED[how] if (name, how) != (ROADIE, MIXED)
    }
    if how == MIXED:
        made[ROADIE] = _bank(setting.device, size, resident).model
    return {name: made[name] for name in COMPARED[how]}


@cache
def _model(device: str, size: ModelSize, name: str, resident: int) -> nn.Module:
    if name == FROZEN:
        return _base(device, size)
    return adapters.with_adapters(_base(device, size), name, TARGETS, resident)


@cache
def _bank(device: str, size: ModelSize, resident: int) -> roadie.AdapterBank:
    base = _base(device, size)
    bank = roadie.AdapterBank(sharing_copy(base), slots=resident)
    bank.update({f"a{seed}": random_adapter(base, seed, group_size=GROUP_SIZE) for seed in range(resident)})
    return bank


@cache
def _base(device: str, size: ModelSize) -> nn.Module:
    return model.llama(size, torch.bfloat16, device).requires_grad_(False)


@contextmanager
def _rows(models: dict[str, nn.Module], rows: int, count: int, how: str) -> Iterator[None]:
    """Entered once, around all steps, as a server does; a graph reads the slots of this block."""
    if how != MIXED:
        yield
        return
    with roadie.rows(models[ROADIE], [f"a{row % count}" for row in range(rows)]):
        yield


def _step(name: str, each: nn.Module, rows: int, count: int, context: int, how: str) -> Run:
    return adapters.step(name, each, [row % count for row in range(rows)], context, named=how in (NAMED, NAMED_PEFT))


def _said(name: str, how: str) -> str:
    return ROADIE_NAMED if (name, how) == (ROADIE, NAMED) else name


def _bytes_decoding(frozen: nn.Module, rows: int, how: str) -> int:
    """An output in and out for each row; and the table's row, once for all rows, or once for each."""
    tables = 1 if how == ONE else rows
    return sum(model.widths(frozen)) * (rows * 2 * torch.bfloat16.itemsize + tables * TABLE_BYTES)


def _peak(run: Run) -> int:
    """How far the allocated memory rises above where it was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _synchronise(setting: Setting) -> Run | None:
    return torch.cuda.synchronize if setting.device == "cuda" else None
