"""Training 64 adapters at once: a step against a step of one adapter over the same tokens, and against 64 runs in turn.

    python -m benchmarks.many_training              a random Llama of 162M parameters, 64 jobs of one row of 64 tokens
    python -m benchmarks.many_training --small      a Llama of 7M parameters, to see that it runs

A step is forward, loss, backward, clipping and AdamW. Rivals are timed in interleaved rounds of one process:

    many jobs               roadie.training.many, one row a job
    one job                 the same code with one job of all rows
    one adapter, tuner      an adapted model, its own loss, torch's clipping and AdamW: what `roadie train` does
    frozen                  forward, loss and backward to the embeddings, without any adapter: the floor
    one row, roadie | LoRA  a step of one adapter on one row: what 64 runs in turn take 64 times a step

The totals of runs in turn are such a step times the number of jobs (extrapolated); loading and data are left out everywhere.
Ratios are given in seconds of the clock and of the processor: the latter say the same on a machine that others use too,
with one thread (more threads wait for each other, and count as working meanwhile).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Rounds, Run, orders, threads
from benchmarks.machine import commit, describe, now
from benchmarks.record import RESULTS, rounded
from benchmarks.rivals import FROZEN, PEFT_LORA, PRECISIONS, ROADIE, adapt, sharing_copy, trained
from benchmarks.statistics import median_ratio, summarise
from benchmarks.workloads.model import TARGETS, ModelSize, flowing_from_embeddings, llama
from roadie.engine.targets import adapted_layers
from roadie.training.encoding import Example
from roadie.training.many import Job, RunSettings
from roadie.training.many.data import JobData
from roadie.training.many.session import Session
from roadie.training.many.state import PreparedJob
from roadie.training.recipe import Recipe

MANY, ONE, TUNER = "many jobs", "one job", "one adapter, tuner"
ROW_ROADIE, ROW_LORA = "one row, roadie", "one row, LoRA r=8"
BOUND = 1.05
REPEATS = 8
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """jobs: of one row of `tokens` each."""

    size: ModelSize
    jobs: int = 64
    tokens: int = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_training", description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model; nothing is written")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the long rivals")
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    small = ModelSize(hidden=256, layers=4, heads=4, intermediate=704, vocabulary=8192)
    case = Case(small if options.small else ModelSize(), options.jobs)
    with threads(options.threads):
        result = run(case, options.rounds)
    print(report(result))
    if not options.small:
        path = RESULTS / f"many-training-{now()[:10]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
        print(f"record: {path}")
    return 0


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Time everything."""
    base = llama(case.size, torch.float32).requires_grad_(False)
    rows = _rows(case)
    long = {
        MANY: _session_step(base, [[row] for row in rows]),
        ONE: _session_step(base, [rows]),
        TUNER: _adapted_step(base, ROADIE, rows),
        FROZEN: _frozen_step(base, rows),
    }
    short = {
        MANY: long[MANY],
        ROW_ROADIE: _repeated(_adapted_step(base, ROADIE, rows[:1])),
        ROW_LORA: _repeated(_adapted_step(base, PEFT_LORA, rows[:1])),
    }
    steps, steps_cpu = _measure(long, rounds)
    turns, turns_cpu = _measure(short, rounds)
    return {
        "machine": describe(),
        "commit": commit(),
        "date": now(),
        "case": {"jobs": case.jobs, "tokens": case.tokens, "size": vars(case.size), "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "clock": summarise(steps, ONE, None),
        "processor": summarise(steps_cpu, ONE, None),
        "in_turn": {"clock": _in_turn(turns, case.jobs), "processor": _in_turn(turns_cpu, case.jobs)},
        "ratios": {
            base_name: {
                "clock": summarise(steps, base_name, None)[MANY]["ratio"],
                "processor": summarise(steps_cpu, base_name, None)[MANY]["ratio"],
            }
            for base_name in (ONE, TUNER, FROZEN)
        },
    }


def _repeated(once: Run) -> Run:
    """`REPEATS` calls, so that a sample is long enough to be disturbed like the others."""

    def several() -> None:
        for _ in range(REPEATS):
            once()

    return several


def _in_turn(rounds: Rounds, jobs: int) -> dict[str, dict[str, float]]:
    """For steps of one row: the median in s, and a step of so many runs in turn over one of all jobs at once."""
    many = rounds.times_s[MANY]
    return {
        name: {
            "median_s": statistics.median(rounds.times_s[name]) / REPEATS,
            **median_ratio([one * jobs / REPEATS for one in rounds.times_s[name]], many),
        }
        for name in (ROW_ROADIE, ROW_LORA)
    }


def _measure(rivals: Mapping[str, Run], rounds: int) -> tuple[Rounds, Rounds]:
    """Seconds of the clock and of the processor of each rival in each round, after one call of each to warm up."""
    clock_s: dict[str, list[float]] = {name: [] for name in rivals}
    cpu_s: dict[str, list[float]] = {name: [] for name in rivals}
    for once in rivals.values():
        once()
    for _, order in zip(range(rounds), orders(list(rivals)), strict=False):
        for name in order:
            gc.collect()
            clock, cpu = time.perf_counter(), time.process_time()
            rivals[name]()
            clock_s[name].append(time.perf_counter() - clock)
            cpu_s[name].append(time.process_time() - cpu)
    return Rounds(clock_s, 1), Rounds(cpu_s, 1)


def _rows(case: Case) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(case.size.vocabulary, (case.jobs, case.tokens), generator=generator).tolist()
    return [Example(tuple(row), tuple(row)) for row in tokens]


def _session_step(base: nn.Module, data: Sequence[list[Example]]) -> Run:
    """A step of `roadie.training.many` with a job for each list of rows."""
    recipe = Recipe(max_steps=10**6, learning_rate=LEARNING_RATE, schedule="constant", target_modules=tuple(TARGETS))
    layers = adapted_layers(base, recipe.to_mapping())
    prepared = [
        PreparedJob(Job(f"job{n}", "-", f"-{n}", recipe), JobData(rows, [], len(rows), n), layers, {}, 10**6)
        for n, rows in enumerate(data)
    ]
    session = Session(base, prepared, RunSettings(max_tokens_per_step=None), (), _never, _never)
    session._join()
    return session._step


def _never(*_: Any) -> Any:
    raise AssertionError("nothing ends here")


def _batch(rows: Sequence[Example]) -> Tensor:
    return torch.tensor([row.input_ids for row in rows])


def _adapted_step(base: nn.Module, rival: str, rows: Sequence[Example]) -> Run:
    """A step of one adapter, by PEFT's way."""
    model = adapt(sharing_copy(base), rival, TARGETS, PRECISIONS["fp32"])
    parameters, tokens = trained(model), _batch(rows)
    rule = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def once() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rule.step()
        rule.zero_grad()

    return once


def _frozen_step(base: nn.Module, rows: Sequence[Example]) -> Run:
    model: Any = sharing_copy(base)
    tokens = _batch(rows)

    def once() -> tuple[Tensor, ...]:
        with flowing_from_embeddings(model) as embedded:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return torch.autograd.grad(loss, embedded)

    return once


def report(result: dict[str, Any]) -> str:
    """The figures as text."""
    case, clock, cpu = result["case"], result["clock"], result["processor"]
    lines = [
        (
            f"{result['parameters'] / 1e6:.0f}M parameters, {case['jobs']} jobs of one row of {case['tokens']} tokens, "
            f"{case['threads']} thread(s); medians and quartiles of a step in s"
        ),
        f"{'':24}{'clock':^32}{'processor':^32}",
    ]
    lines += [f"{name:24}{_spread(clock[name]):^32}{_spread(cpu[name]):^32}" for name in clock]
    for base, ratio in result["ratios"].items():
        bound = f"; bound {BOUND}" if base == ONE else ""
        lines.append(
            f"{MANY} / {base}: clock {_interval(ratio['clock'])}, processor {_interval(ratio['processor'])}{bound}"
        )
    for kind, of_kind in result["in_turn"].items():
        for name, ratio in of_kind.items():
            lines.append(
                f"{case['jobs']} runs in turn ({name}, {ratio['median_s']:.3f} s a step) / {MANY}, {kind}: {_interval(ratio)}"
            )
    return "\n".join(lines)


def _spread(one: dict[str, Any]) -> str:
    return f"{one['median_ms'] / 1e3:.3f} ({one['q1_ms'] / 1e3:.3f} to {one['q3_ms'] / 1e3:.3f})"


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
