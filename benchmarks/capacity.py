"""What more capacity costs to serve. ``python -m benchmarks.capacity layer decode prefill``

    layer    one layer, 4096 x 4096, 64 rows of 64 adapters: the rotations' time over the layer's
    decode   a Llama of 160M parameters: a step of 64 rows with 64 adapters, beside PEFT LoRA r=8
    prefill  the same, of 64 x 64 tokens

Options are rotations in a row, and one of the layer's input besides. In decode the rows' adapters are in force over all steps, as
they are in `generate` and in the server; in prefill they are put in force anew each time. Everything that is compared runs
interleaved in one process. Prints tables and writes benchmarks/results/<machine>/capacity-<commit>.json, with the bytes of tables
that a step reads and how fast this machine copies; parts that were run before stay in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters
from roadie.kernels import Chain, PreparedRotation, RotationTable, prepare_rotation, rotate, rotate_
from roadie.rotation import parameter_size


@dataclass(frozen=True)
class Option:
    """The group sizes of each layer's rotations: of its output, and of its input."""

    stages: tuple[int, ...]
    input_stages: tuple[int, ...] = ()


OPTIONS = {
    "64": Option((64,)),
    "2, 64": Option((2, 64)),
    "2, 16, 64": Option((2, 16, 64)),
    "64 + input 64": Option((64,), (64,)),
}
ONE = "64"
WIDTH, ROWS = 4096, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_adapter(base: nn.Module, seed: int, option: Option) -> Adapter:
    """A road_1 adapter of all linear layers with these rotations, with values of its own."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in base.named_modules():
        if not isinstance(module, nn.Linear) or path.rpartition(".")[2] not in TARGETS:
            continue
        sites = {
            path: (module.out_features, option.stages),
            f"{path}{INPUT_SUFFIX}": (module.in_features, option.input_stages),
        }
        for site, (width, stages) in sites.items():
            size = len(stages) * parameter_size("road_1", width)
            theta, alpha = (0.1 * torch.randn(size, generator=generator) for _ in range(2))
            if stages:
                layers[site] = LayerParameters(theta, 1 + alpha, "road_1", stages)
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
    """The time of each option's rotations, as a bank makes them right before and after the layer, over the layer's own."""
    entries = []
    slots = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for name, dtype in DTYPES.items():
        base = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        for tokens in (1, 64):
            x = torch.randn(ROWS, tokens, WIDTH, dtype=dtype)
            with torch.no_grad():
                sites = {
                    name: [Site(random_chain(ROWS, stages, dtype), slots, x) for stages in (of.stages, of.input_stages)]
                    for name, of in OPTIONS.items()
                }
                shares = _shares(base, x, sites, rounds if tokens == 1 else 6)
            case = {"dtype": name, "tokens_a_row": tokens, "rows": ROWS}
            entries.append({"what": "layer", "case": case, "rotations_over_layer": shares})
            print(case, shares, flush=True)
    return entries


class Site:
    """A layer's output or input and its rotations, none or some; both are 4096 wide here."""

    def __init__(self, chain: Chain, slots: torch.Tensor, like: torch.Tensor) -> None:
        self._chain, self._slots = chain, slots
        self._prepared: PreparedRotation | None = prepare_rotation(like, chain, slots) if chain else None

    def rotate_(self, y: torch.Tensor) -> None:
        """In place, as a layer's output."""
        if self._chain and (self._prepared is None or not self._prepared(y)):
            rotate_(y, self._chain, self._slots)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """In new memory, as a layer's input."""
        if not self._chain:
            return x
        z = torch.empty_like(x)
        if self._prepared is not None and self._prepared(x, z):
            return z
        return rotate(x, self._chain, self._slots)


def _shares(base: nn.Linear, x: torch.Tensor, sites: dict[str, list[Site]], rounds: int) -> dict[str, dict[str, float]]:
    layers: dict[str, list[float]] = {option: [] for option in sites}
    rotations: dict[str, list[float]] = {option: [] for option in sites}
    for _ in range(rounds + 2):
        for option, (of_output, of_input) in sites.items():
            start = time.perf_counter()
            given = of_input.rotated(x)
            before = time.perf_counter()
            y = base(given)
            after = time.perf_counter()
            of_output.rotate_(y)
            layers[option].append(after - before)
            rotations[option].append(time.perf_counter() - after + before - start)
    return {option: median_ratio(rotations[option][2:], layers[option][2:]) for option in sites}


def model(mode: str, rows: int = ROWS, size: ModelSize = SIZE, budget_s: float = 60.0) -> list[dict[str, Any]]:
    """Whole model, float32: decode or prefill of rows that all use different adapters, over single rotations."""
    base = llama(size, torch.float32).requires_grad_(False)
    names = [f"a{index}" for index in range(rows)]
    banks = {}
    for option, of in OPTIONS.items():
        banks[option] = roadie.AdapterBank(sharing(base, size), slots=rows)
        banks[option].update({name: random_adapter(base, index, of) for index, name in enumerate(names)})
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    rival = with_adapters(sharing(base, size), lora, names)
    tokens = torch.randint(0, size.vocabulary, (rows, 64))
    steps = {"base": step(mode, base, rows, tokens)}
    with ExitStack() as in_force:
        for option, bank in banks.items():
            slots, run = bank.slots(names), partial(step, mode, bank.model, rows, tokens)
            if mode == "decode":
                in_force.enter_context(torch.no_grad())
                in_force.enter_context(bank.rows(slots))
                steps[option] = run()
            else:
                steps[option] = in_bank(bank, slots, run)
        steps["PEFT LoRA r=8"] = step(mode, rival, rows, tokens, adapter_names=names)
        rounds = measure(steps, Budget(budget_s, 5, warm_up_calls=1, shortest_sample_s=0))
    case = {"mode": mode, "rows": rows, "adapters": rows, "dtype": "fp32", "threads": torch.get_num_threads()}
    over_one, over_base = summarise(rounds, ONE, None), summarise(rounds, "base", None)
    print(mode, rounds.count, {k: (round(s["median_ms"], 1), s["ratio"]) for k, s in over_one.items()}, flush=True)
    table_bytes = {option: bank.bytes_per_adapter * rows for option, bank in banks.items()}
    measured = {"over_single": over_one, "over_base": over_base, "table_bytes": table_bytes}
    return [{"what": mode, "case": case, "rounds": rounds.count, "copy_bytes_per_s": copy_bytes_per_s(), **measured}]


def copy_bytes_per_s(elements: int = 64 << 20) -> float:
    """Bytes read and written a second where memory is copied to memory, the median of seven; float32."""
    source, target = torch.randn(elements), torch.empty(elements)
    rounds = measure({"copy": partial(target.copy_, source)}, Budget(0.0, 7, shortest_sample_s=0))
    return 2 * source.nbytes / statistics.median(rounds.times_s["copy"])


PARTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], int | None]] = {
    "layer": (layer, 1),
    "decode": (partial(model, "decode"), None),
    "prefill": (partial(model, "prefill"), None),
}


def main() -> None:
    """Run the parts that are named and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS), help="which parts (all)")
    made, entries = machine.commit(), []
    for name in parser.parse_args().parts:
        run, count = PARTS[name]
        with threads(count or torch.get_num_threads()):
            entries += run()
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
