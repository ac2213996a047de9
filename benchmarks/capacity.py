"""What more capacity costs to serve. ``python -m benchmarks.capacity layer decode prefill``

    layer    one layer of 4096 outputs, 64 rows of 64 adapters: rotations in a row over a single rotation, of the layer's time
    decode   a Llama of 160M parameters: a step of 64 rows with 64 adapters, beside PEFT LoRA r=8
    prefill  the same, of 64 x 64 tokens

Everything that is compared runs interleaved in one process. Prints tables and writes
benchmarks/results/<machine>/capacity-<commit>.json; parts that were run before stay in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

import roadie
from benchmarks import machine
from benchmarks.bank import SIZE, in_bank, sharing, step, with_adapters
from benchmarks.harness import Budget, measure, threads
from benchmarks.statistics import median_ratio, summarise
from benchmarks.workloads.model import TARGETS, ModelSize, llama
from roadie.adapter import Adapter, LayerParameters
from roadie.kernels import Chain, RotationTable, prepare_chain, rotate_chain_
from roadie.rotation import parameter_size

OPTIONS: dict[str, tuple[int, ...]] = {"64": (64,), "2, 64": (2, 64), "2, 16, 64": (2, 16, 64)}
ONE = "64"
WIDTH, ROWS = 4096, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_adapter(base: nn.Module, seed: int, stages: tuple[int, ...]) -> Adapter:
    """A road_1 adapter of all linear layers with these rotations in a row, with values of its own."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in TARGETS:
            size = len(stages) * parameter_size("road_1", module.out_features)
            theta, alpha = (0.1 * torch.randn(size, generator=generator) for _ in range(2))
            layers[path] = LayerParameters(theta, 1 + alpha, "road_1", stages)
    return Adapter(layers, {"peft_type": "ROAD", "variant": "road_1", "target_modules": TARGETS})


def random_chain(slots: int, stages: tuple[int, ...], dtype: torch.dtype) -> Chain:
    """Tables of rotations in a row of 4096 outputs, near the identity."""
    return tuple(
        RotationTable(
            1 + 0.1 * torch.randn(slots, WIDTH, dtype=dtype), 0.1 * torch.randn(slots, WIDTH, dtype=dtype), group_size
        )
        for group_size in stages
    )


def layer(rounds: int = 80) -> list[dict[str, Any]]:
    """The time of each option's rotations, as a bank makes them right after the layer, over the layer's own."""
    entries = []
    slots = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for name, dtype in DTYPES.items():
        base = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        for tokens in (1, 64):
            x = torch.randn(ROWS, tokens, WIDTH, dtype=dtype)
            tables = {option: random_chain(ROWS, stages, dtype) for option, stages in OPTIONS.items()}
            with torch.no_grad():
                shares = _shares(base, x, tables, slots, rounds if tokens == 1 else 6)
            case = {"dtype": name, "tokens_a_row": tokens, "rows": ROWS}
            entries.append({"what": "layer", "case": case, "rotations_over_layer": shares})
            print(case, shares, flush=True)
    return entries


def _shares(
    base: nn.Linear, x: torch.Tensor, tables: dict[str, Chain], slots: torch.Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    prepared = {option: prepare_chain(base(x), chain, slots) for option, chain in tables.items()}
    layers: dict[str, list[float]] = {option: [] for option in tables}
    rotations: dict[str, list[float]] = {option: [] for option in tables}
    for _ in range(rounds + 2):
        for option, chain in tables.items():
            start = time.perf_counter()
            y = base(x)
            between = time.perf_counter()
            ready = prepared[option]
            if ready is None or not ready.rotate_(y):
                rotate_chain_(y, chain, slots)
            layers[option].append(between - start)
            rotations[option].append(time.perf_counter() - between)
    return {option: median_ratio(rotations[option][2:], layers[option][2:]) for option in tables}


def model(mode: str, rows: int = ROWS, size: ModelSize = SIZE, budget_s: float = 60.0) -> list[dict[str, Any]]:
    """Whole model, float32: decode or prefill of rows that all use different adapters, over single rotations."""
    base = llama(size, torch.float32).requires_grad_(False)
    names = [f"a{index}" for index in range(rows)]
    banks = {}
    for option, stages in OPTIONS.items():
        banks[option] = roadie.AdapterBank(sharing(base, size), slots=rows)
        banks[option].update({name: random_adapter(base, index, stages) for index, name in enumerate(names)})
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    rival = with_adapters(sharing(base, size), lora, names)
    tokens = torch.randint(0, size.vocabulary, (rows, 64))
    steps = {"base": step(mode, base, rows, tokens)}
    for option, bank in banks.items():
        run = partial(step, mode, bank.model, rows, tokens)
        steps[option] = in_bank(bank, bank.slots(names), run)
    steps["PEFT LoRA r=8"] = step(mode, rival, rows, tokens, adapter_names=names)
    rounds = measure(steps, Budget(budget_s, 5, warm_up_calls=1, shortest_sample_s=0))
    case = {"mode": mode, "rows": rows, "adapters": rows, "dtype": "fp32", "threads": torch.get_num_threads()}
    over_one, over_base = summarise(rounds, ONE, None), summarise(rounds, "base", None)
    print(mode, rounds.count, {k: (round(s["median_ms"], 1), s["ratio"]) for k, s in over_one.items()}, flush=True)
    return [{"what": mode, "case": case, "rounds": rounds.count, "over_single": over_one, "over_base": over_base}]


PARTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], int | None]] = {
    "layer": (layer, 1),
    "decode": (partial(model, "decode"), None),
    "prefill": (partial(model, "prefill"), None),
}


def main() -> None:
    """Run the parts that are named and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS), help="which parts (all)")
    entries = []
    for name in parser.parse_args().parts:
        run, count = PARTS[name]
        with threads(count or torch.get_num_threads()):
            entries += run()
    made = machine.commit()
    path = machine.ROOT / "benchmarks" / "results" / machine.machine_name() / f"capacity-{made['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # parts that were run before stay
        ran = {entry["what"] for entry in entries}
        entries = [entry for entry in json.loads(path.read_text())["entries"] if entry["what"] not in ran] + entries
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    record = {"machine": machine.machine_name(), **made, "date": machine.now()[:10], **versions, "entries": entries}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path.relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
