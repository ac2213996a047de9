"""Which cases are run and how long each may take: 15 minutes on two cores for all, a minute for the quick ones.

Whole models have as long again, since only who has a checkpoint measures most of them: a round of six rivals takes a minute with
1024 tokens of a model of 135M parameters. What has not begun after WHOLE_DEADLINE_S is left out.

Cases with few tokens are short, and the intervals that the bounds are read from need many of their rounds. With 4096
tokens one call takes seconds in float32, so these cases get few rounds (four, or two for 11008 outputs), and their
intervals are wide; the number of rounds stands beside them. They come last: what has not begun after DEADLINE_S is left
out, and the document says so.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Budget
from benchmarks.machine import cores
from benchmarks.rivals import AGAIN, FROZEN, PRECISIONS, RIVALS, ROADIE
from benchmarks.workloads import kept, layer, model, peak, real_model, rotation
from benchmarks.workloads.kept import KeptCase
from benchmarks.workloads.layer import FORWARD, LayerCase
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import DECODE, PREFILL, TRAINING, ModelCase, ModelSize
from benchmarks.workloads.real_model import Checkpoint, Shapes, WholeCase
from benchmarks.workloads.rotation import RotationCase

DEADLINE_S = 13 * 60
WHOLE_DEADLINE_S = 15 * 60
TOKENS = (1, 8, 64, 512, 4096)
TINY = ModelSize(hidden=64, layers=2, heads=4, intermediate=128, vocabulary=256)
MODEL_PRECISIONS = ("fp32", "bf16, fp32 adapter")
RESIDENTS = Checkpoint("a random Llama of 4 layers, 1024 wide", ModelSize(1024, 4, 16, 2816, 4096))
TINY_CHECKPOINT = Checkpoint("a tiny random Llama", TINY)
TINY_SHAPES = Shapes((1,), (1, 4), 4, (8, 16), adapters=3, mixed_rows=(4,), mixed_training=((4, 2),))


@dataclass(frozen=True)
class Task:
    """One or more entries of the record: what is run, in words, and how."""

    title: str
    run: Callable[[], list[dict[str, Any]]]


def full() -> Iterator[Task]:
    """Everything the document shows."""
    yield from _rotations(("fp32", "bf16"), TOKENS, seconds=1.0, default_threads=True)
    yield from _kept(tuple(PRECISIONS), (kept.LINEAR, kept.SILU, kept.RELU, kept.MLP, kept.BLOCK))
    yield from _kept(("bf16, fp32 adapter",), (kept.LINEAR, kept.SILU, kept.MLP), kept.PARTITIONED)
    yield from _kept(("fp32",), (kept.BLOCK,), kept.PARTITIONED)
    if has_compiler():
        yield from _kept(("fp32",), (kept.MLP,), kept.INDUCTOR)
    for precision in MODEL_PRECISIONS:
        yield from _models(precision, ModelSize(), seconds=(6.0, 5.0, 25.0))
    yield from _peaks(ModelSize(), rows=2, tokens=256, layer_tokens=1024, names=RIVALS)
    for out_features in (4096, 11008):
        for tokens in TOKENS[:-1]:
            yield from _layers(out_features, tokens, layer_budget(out_features, tokens))
    for out_features in (4096, 11008):
        yield from _layers(out_features, TOKENS[-1], layer_budget(out_features, TOKENS[-1]))


def quick() -> Iterator[Task]:
    """One or two cases of each workload, to see that everything runs."""
    yield from _rotations(("fp32", "bf16"), (8, 4096), seconds=0.3, default_threads=False)
    yield from _kept(("bf16, fp32 adapter",), (kept.SILU, kept.MLP))
    yield from _kept(("fp32",), (kept.SILU,), kept.PARTITIONED)
    yield from _models("fp32", TINY, seconds=(0.2, 0.2, 0.2))
    yield from _peaks(TINY, rows=2, tokens=32, layer_tokens=64, names=(FROZEN, ROADIE))
    for tokens in (1, 64):
        yield from _layers(4096, tokens, Budget(0.5, 3))


def whole_models(
    checkpoint: Checkpoint | None, precision: str, shapes: Shapes, budget: Callable[[WholeCase], Budget]
) -> Iterator[Task]:
    """A checkpoint, where there is one, and 64 rows of 200 resident adapters through a random Llama."""
    residents = WholeCase(real_model.ONE_TOKEN, "fp32", rows=64, tokens=1, threads=1, adapters=200)
    yield from _whole(real_model.RESIDENTS, RESIDENTS, [residents], budget)
    if checkpoint is not None:
        found = [case for case in real_model.cases(shapes, precision) if case.threads <= cores()]
        yield from _whole(real_model.CHECKPOINT, checkpoint, found, budget)


def quick_whole_models(checkpoint: Checkpoint | None) -> Iterator[Task]:
    """A few short steps, of a tiny random Llama if there is no checkpoint."""
    few = Budget(0.1, min_rounds=3)
    found = real_model.cases(TINY_SHAPES, "fp32")
    yield from _whole(real_model.CHECKPOINT, checkpoint or TINY_CHECKPOINT, found, lambda case: few)
    residents = WholeCase(real_model.ONE_TOKEN, "fp32", rows=4, tokens=1, threads=1, adapters=6)
    yield from _whole(real_model.RESIDENTS, TINY_CHECKPOINT, [residents], lambda case: few)


def whole_budget(case: WholeCase) -> Budget:
    """Time for a step of a whole model: it is stated for one thread, which gets more of it."""
    tokens = real_model.tokens_in(case)
    share = 1.0 if case.threads == 1 else 0.5
    if case.mode != TRAINING:
        return Budget((12.0 if tokens == 1 else 25.0) * share, min_rounds=12)
    if tokens <= 64:
        return Budget(25.0 * share, min_rounds=7)
    return Budget(60.0 * share, min_rounds=4 if tokens > 256 else 6, warm_up_calls=1)


def _whole(
    workload: str, checkpoint: Checkpoint, cases: list[WholeCase], budget: Callable[[WholeCase], Budget]
) -> Iterator[Task]:
    """Models are loaded and adapted once, by the first task that needs them, and go with the last."""

    @functools.cache
    def base(precision: str) -> Any:
        return real_model.load(checkpoint, PRECISIONS[precision].base)

    @functools.cache
    def models(precision: str, adapters: int) -> real_model.Models:
        if adapters == 1:
            return real_model.single_models(base(precision), PRECISIONS[precision])
        # PEFT takes a minute to add 200 adapters of LoRA, and nothing is said of it there.
        names = real_model.ONLY_OURS if workload == real_model.RESIDENTS else real_model.MIXED_NAMES
        return real_model.mixed_models(base(precision), adapters, names)

    for case in cases:
        adapters = f", {case.adapters} adapters" if case.adapters > 1 else ""
        what = f"{case.mode}, {case.precision}, {case.rows} x {case.tokens}{adapters}, {case.threads} threads"

        def run(case: WholeCase = case) -> list[dict[str, Any]]:
            compared = models(case.precision, case.adapters)
            return [real_model.run(workload, checkpoint.name, case, budget(case), compared)]

        yield Task(f"{checkpoint.name}: {what}", run)


def has_compiler() -> bool:
    """Whether inductor can compile for the CPU here."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def layer_budget(out_features: int, tokens: int) -> Budget:
    """Time for a layer's case: the bounds are stated for 4096 outputs, which get more of it."""
    stated = out_features == 4096
    if tokens == 4096:
        # A round of five rivals takes up to 40 s (float32, 11008 outputs, one core): the fewest rounds decide.
        return Budget(8.0 if stated else 4.0, min_rounds=4 if stated else 2, warm_up_calls=0)
    if tokens == 512:
        return Budget(7.0 if stated else 3.0, min_rounds=6 if stated else 3, warm_up_calls=1)
    return Budget(4.0 if stated else 1.0, min_rounds=8)


def _layers(out_features: int, tokens: int, budget: Budget) -> Iterator[Task]:
    # The frozen layer a second time shows what the harness makes of no difference at all; too dear for the largest.
    names = (*RIVALS, AGAIN) if tokens < 4096 else RIVALS
    for precision in PRECISIONS:
        for mode in (FORWARD, LAYER_TRAINING):
            case = LayerCase(mode, precision, out_features, tokens)
            title = f"layer {mode}, {precision}, {tokens} tokens x {out_features}"
            yield Task(title, lambda case=case: [layer.run(case, budget, names)])


def _rotations(
    precisions: tuple[str, ...], tokens: tuple[int, ...], seconds: float, default_threads: bool
) -> Iterator[Task]:
    cases = [RotationCase(precision, count) for precision in precisions for count in tokens]
    if default_threads and torch.get_num_threads() > 1:
        cases += [RotationCase(precision, tokens[-1], threads=torch.get_num_threads()) for precision in precisions]
    for case in cases:
        budget = Budget(seconds if case.tokens < 4096 else 4 * seconds)
        title = f"rotation alone, {case.precision}, {case.tokens} tokens x {case.out_features}, {case.threads} threads"
        yield Task(title, lambda case=case, budget=budget: [rotation.run(case, budget)])


def _kept(precisions: tuple[str, ...], whats: tuple[str, ...], mode: str = "eager") -> Iterator[Task]:
    for precision in precisions:
        for what in whats:
            case = KeptCase(what, precision, mode)
            yield Task(f"bytes kept, {what}, {precision}, {mode}", lambda case=case: [kept.run(case)])


def _models(precision: str, size: ModelSize, seconds: tuple[float, float, float]) -> Iterator[Task]:
    cases = [
        ModelCase(PREFILL, precision, rows=1, tokens=512, size=size),
        ModelCase(DECODE, precision, rows=8, tokens=128, size=size),
        ModelCase(TRAINING, precision, rows=2, tokens=256, size=size),
    ]

    def run() -> list[dict[str, Any]]:
        models = model.rivals_of(cases[0])
        budgets = [Budget(time, min_rounds=5, warm_up_calls=1) for time in seconds]
        return [model.run(case, budget, models) for case, budget in zip(cases, budgets, strict=True)]

    yield Task(f"whole model, {precision}: prefill, decoding, training step", run)


def _peaks(size: ModelSize, rows: int, tokens: int, layer_tokens: int, names: tuple[str, ...]) -> Iterator[Task]:
    layers = [LayerCase(LAYER_TRAINING, precision, 4096, layer_tokens) for precision in MODEL_PRECISIONS]
    models = [ModelCase(TRAINING, precision, rows, tokens, size=size) for precision in MODEL_PRECISIONS]
    yield Task("peak memory", lambda: peak.run(models, layers, names))
