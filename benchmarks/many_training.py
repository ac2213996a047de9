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
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Budget, Run, measure
from benchmarks.machine import commit, describe, now
from benchmarks.record import RESULTS, rounded
from benchmarks.rivals import FROZEN, PEFT_LORA, PRECISIONS, ROADIE, adapt, sharing_copy, trained
from benchmarks.statistics import summarise
from benchmarks.workloads.model import TARGETS, ModelSize, flowing_from_embeddings, llama
from roadie.training.encoding import Example
from roadie.training.many import Job, RunSettings
from roadie.training.many.data import JobData
from roadie.training.many.session import Session
from roadie.training.many.state import PreparedJob
from roadie.training.many.targets import adapted_layers
from roadie.training.recipe import Recipe

MANY, ONE, TUNER = "many jobs", "one job", "one adapter, tuner"
ROW_ROADIE, ROW_LORA = "one row, roadie", "one row, LoRA r=8"
BOUND = 1.05
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
    options = parser.parse_args(arguments)
    small = ModelSize(hidden=256, layers=4, heads=4, intermediate=704, vocabulary=8192)
    case = Case(small if options.small else ModelSize(), options.jobs)
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
    short = {ROW_ROADIE: _adapted_step(base, ROADIE, rows[:1]), ROW_LORA: _adapted_step(base, PEFT_LORA, rows[:1])}
    steps = measure(long, Budget(0.0, min_rounds=rounds, max_rounds=rounds, warm_up_calls=1))
    single = measure(short, Budget(0.0, min_rounds=4 * rounds, max_rounds=4 * rounds, warm_up_calls=2))
    return {
        "machine": describe(),
        "commit": commit(),
        "date": now(),
        "case": {"jobs": case.jobs, "tokens": case.tokens, "size": vars(case.size)},
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "steps": {**summarise(steps, ONE, None), **summarise(single, ROW_ROADIE, None)},
        "to_tuner": summarise(steps, TUNER, None)[MANY]["ratio"],
        "to_frozen": summarise(steps, FROZEN, None)[MANY]["ratio"],
    }


def _rows(case: Case) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(case.size.vocabulary, (case.jobs, case.tokens), generator=generator).tolist()
    return [Example(tuple(row), tuple(row)) for row in tokens]


def _session_step(base: nn.Module, data: Sequence[list[Example]]) -> Run:
    """A step of `roadie.training.many` with a job for each list of rows."""
    recipe = Recipe(max_steps=10**6, learning_rate=LEARNING_RATE, schedule="constant", target_modules=tuple(TARGETS))
    layers = adapted_layers(base, recipe)
    prepared = [
        PreparedJob(Job(f"job{n}", "-", f"-{n}", recipe), JobData(rows, [], len(rows), n), layers, 10**6)
        for n, rows in enumerate(data)
    ]
    session = Session(base, prepared, RunSettings(max_tokens_per_step=None), (), _never, _never)
    session._join()
    paths = [layer.path for layer in layers]

    def once() -> None:
        with session.bank.attached(base, paths):
            session._step()

    return once


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
    steps, jobs = result["steps"], result["case"]["jobs"]
    many_s = steps[MANY]["median_ms"] / 1e3

    def line(name: str) -> str:
        one = steps[name]
        return f"{name:22} {one['median_ms']:9.1f} ms   quartiles {one['q1_ms']:.1f} to {one['q3_ms']:.1f}"

    def interval(ratio: dict[str, float]) -> str:
        return f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"

    total: Callable[[str], float] = lambda name: steps[name]["median_ms"] / 1e3 * jobs  # noqa: E731
    return "\n".join(
        [
            f"{result['parameters'] / 1e6:.0f}M parameters, {jobs} jobs of one row of {result['case']['tokens']} tokens",
            *(line(name) for name in steps),
            f"many / one job: {interval(steps[MANY]['ratio'])}; bound {BOUND}",
            f"many / one adapter, tuner: {interval(result['to_tuner'])}",
            f"many / frozen: {interval(result['to_frozen'])}",
            (
                f"{jobs} runs in turn, a step each: roadie {total(ROW_ROADIE):.2f} s, LoRA r=8 {total(ROW_LORA):.2f} s; "
                f"all at once {many_s:.2f} s: {total(ROW_ROADIE) / many_s:.2f} and {total(ROW_LORA) / many_s:.2f} times faster"
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
