"""Merging one large layer: seconds and extra memory beside stock PEFT's RoAd, in one process; and what 20 cycles leave.

    python -m benchmarks.merging                    11008 x 4096, the MLP of a 7B Llama; about a minute
    python -m benchmarks.merging --outputs 1024     a layer that stock PEFT can be timed on more than once (--stock-rounds)

A round merges and unmerges once. The rivals share nothing but the values: each has a copy of the weight and the same
theta and alpha. Extra memory is what the process holds at most beyond what it held before (`memory.peak_bytes`),
in a round of its own that is not timed. Limits of this comparison: stock PEFT's unmerge takes half a minute at full
size, so it is timed once by default, and one number has no spread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

import roadie
from benchmarks.machine import commit, machine_name
from benchmarks.memory import peak_bytes
from roadie.testing import randomise, stock_peft
from roadie.testing.rival import is_stock

STEPS = ("merge", "unmerge")
MIB = 2**20
CYCLES = 20


@dataclass
class Rival:
    """A layer that can be merged and unmerged, and what was measured of it by step."""

    name: str
    layer: Any
    times_s: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    extra_bytes: dict[str, int] = field(default_factory=dict)

    def time_round(self) -> None:
        """Merge and unmerge once, by the clock."""
        for step in STEPS:
            start = time.perf_counter()
            getattr(self.layer, step)()
            self.times_s[step].append(time.perf_counter() - start)

    def weigh_round(self) -> None:
        """Merge and unmerge once, watching memory."""
        for step in STEPS:
            self.extra_bytes[step] = peak_bytes(getattr(self.layer, step))

    def median_s(self, step: str) -> float:
        """The median of the rounds that were timed."""
        return statistics.median(self.times_s[step])


def rivals(outputs: int, inputs: int, variant: str) -> tuple[Rival, Rival]:
    """roadie's layer and stock PEFT's, of equal weights and adapters."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(inputs, outputs))
    settings = {"target_modules": ["0"], "variant": variant}
    ours = roadie.get_peft_model(copy.deepcopy(base), roadie.RoadConfig(**settings))
    with stock_peft() as config:
        stock = peft.get_peft_model(base, config(**settings))
    assert is_stock(stock)
    assert not is_stock(ours)
    made = [Rival(name, randomise(model).base_model.model[0]) for name, model in (("roadie", ours), ("PEFT", stock))]
    return made[0], made[1]


def measure(ours: Rival, stock: Rival, rounds: int, stock_rounds: int) -> None:
    """All rounds, the rivals by turns as long as both have rounds left."""
    ours.time_round()  # warm-up: first use of kernels and of memory
    for times in ours.times_s.values():
        times.clear()
    ours.weigh_round()
    for index in range(max(rounds, stock_rounds)):
        if index < rounds:
            ours.time_round()
        if index < stock_rounds:
            # One round must serve for both where a round takes half a minute; watching memory costs a few microseconds.
            _timed_and_weighed(stock)


def _timed_and_weighed(rival: Rival) -> None:
    for step in STEPS:
        rival.extra_bytes[step] = peak_bytes(_clocked(rival, step))


def _clocked(rival: Rival, step: str) -> Callable[[], None]:
    def run() -> None:
        start = time.perf_counter()
        getattr(rival.layer, step)()
        rival.times_s[step].append(time.perf_counter() - start)

    return run


def cycles(outputs: int, inputs: int, variant: str) -> tuple[bool, float]:
    """Whether a bfloat16 weight has the same bits after 20 cycles, and the bytes kept an element while it is merged."""
    torch.manual_seed(0)
    config = roadie.RoadConfig(target_modules=["0"], variant=variant)
    model = roadie.get_peft_model(nn.Sequential(nn.Linear(inputs, outputs, dtype=torch.bfloat16)), config)
    layer = randomise(model).base_model.model[0]
    weight = layer.get_base_layer().weight
    before, kept = weight.detach().clone(), 0
    for _ in range(CYCLES):
        layer.merge()
        assert not torch.equal(weight, before), "merging changed nothing"
        kept = layer.unmerge_bytes
        layer.unmerge()
    return torch.equal(weight.view(torch.int16), before.view(torch.int16)), kept / weight.numel()


def table(ours: Rival, stock: Rival) -> str:
    """A row for each step: median seconds with the range, extra memory, and the ratio of the medians."""
    lines = [f"{'':8}  {'roadie, ms':>22}  {'PEFT, ms':>22}  {'ratio':>7}  {'roadie, MiB':>11}  {'PEFT, MiB':>9}"]
    for step in STEPS:
        ratio = stock.median_s(step) / ours.median_s(step)
        memory = f"{ours.extra_bytes[step] / MIB:11.1f}  {stock.extra_bytes[step] / MIB:9.1f}"
        lines.append(f"{step:8}  {_spread(ours, step):>22}  {_spread(stock, step):>22}  {ratio:6.0f}x  {memory}")
    return "\n".join(lines)


def _spread(rival: Rival, step: str) -> str:
    times_ms = [seconds * 1e3 for seconds in rival.times_s[step]]
    middle = f"{statistics.median(times_ms):.1f}"
    return middle if len(times_ms) == 1 else f"{middle} ({min(times_ms):.1f} to {max(times_ms):.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=11008)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--variant", default="road_2")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of roadie")
    parser.add_argument("--stock-rounds", type=int, default=1, help="rounds of PEFT, by turns with roadie's")
    chosen = parser.parse_args()
    shape = chosen.outputs, chosen.inputs, chosen.variant
    ours, stock = rivals(*shape)
    measure(ours, stock, chosen.rounds, chosen.stock_rounds)
    same, kept = cycles(*shape)
    print(
        f"{chosen.outputs} x {chosen.inputs}, {chosen.variant}, float32; {torch.get_num_threads()} threads, torch",
        end="",
    )
    print(f" {torch.__version__}, peft {peft.__version__}, {machine_name()}, commit {commit()['commit']}")
    print(table(ours, stock))
    verdict = "the same bits" if same else "OTHER bits"
    print(f"{CYCLES} cycles in bfloat16 leave {verdict}; {kept:.2f} bytes an element are kept while merged")


if __name__ == "__main__":
    main()
