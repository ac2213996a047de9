"""One run: a model adapted, trained, and measured; all methods see the same rows in the same order for one seed.

AdamW without weight decay, linear schedule with a warm-up of a tenth, gradients clipped at 1, no dropout, float32.
Time is processor time of the training steps alone: it says the same on a machine that others use too.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.memory import peak_bytes
from benchmarks.quality.methods import Method
from benchmarks.quality.tasks import Batch, Row, Task, collate, measured, tally

WARM_UP_SHARE = 0.1
CLIPPED_AT = 1.0
CURVE_POINTS = 12
HOPELESS_NATS = 1.0
"""A run whose loss over the last steps is so far above its first is stopped: no schedule brings it back."""


Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Trained:
    """What training leaves: losses of the steps, where it was stopped (None: it was not), processor seconds."""

    losses: list[float]
    stopped_at: int | None
    processor_s: float


def factor(step: int, steps: int) -> float:
    """The share of the peak rate at a step: up over a tenth of the steps, then down to zero, linearly."""
    warm_up = max(1, math.ceil(WARM_UP_SHARE * steps))
    return (step + 1) / warm_up if step < warm_up else (steps - step) / (steps - warm_up + 1)


def run(
    task: Task, method: Method, learning_rate: float, seed: int, base: nn.Module, schedule: Schedule = factor
) -> dict[str, Any]:
    """Train and measure; gives the part of the record that the run itself knows. `base` is copied, not changed."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base).requires_grad_(False)
    start_head(model, task, seed)
    adapted = method.adapt(model, task)
    trained: list[Trained] = []
    peak = peak_bytes(lambda: trained.append(_train(task, adapted, learning_rate, seed, schedule)))
    done = trained[0]
    diverged = done.stopped_at is not None
    return {
        **count_parameters(adapted, task),
        "stored_bytes": stored_bytes(adapted),
        "processor_s": done.processor_s,
        "peak_bytes": peak,
        "stopped_at": done.stopped_at,
        "curve": thinned(done.losses),
        "validation": None if diverged else measured(task, adapted, task.splits.validation),
        "test": None if diverged else measured(task, adapted, task.splits.test),
    }


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """Without end: batches of `draws`."""
    return (collate(rows, task.pad_id) for rows in draws(task, task.batch_rows, seed))


def draws(task: Task, count: int, seed: int) -> Iterator[list[Row]]:
    """Without end: `count` rows at a time in an order that depends on the seed alone; every row once before any row again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < count:
            waiting += torch.randperm(len(task.splits.train), generator=generator).tolist()
        chosen, waiting = waiting[:count], waiting[count:]
        yield [task.splits.train[index] for index in chosen]


def start_head(model: nn.Module, task: Task, seed: int) -> None:
    """The same fresh head for every method of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if task.head and name.startswith(task.head):
            with torch.no_grad():
                values = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(values if parameter.dim() > 1 else torch.zeros_like(parameter))


def _train(task: Task, model: nn.Module, learning_rate: float, seed: int, share: Schedule) -> Trained:
    head, rest = trainable(model, task)
    groups = [{"params": list(rest.values()), "lr": learning_rate}]
    if head:
        groups.append({"params": list(head.values()), "lr": task.head_rate if rest else learning_rate})
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, task.steps))
    parameters = [*rest.values(), *head.values()]
    model.eval()  # no dropout, whatever the model's own configuration
    losses: list[float] = []
    rows = batches(task, seed)
    started = time.process_time()
    for step in range(task.steps):
        loss = tally(task, model, next(rows)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIPPED_AT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
        if is_hopeless(losses):
            return Trained(losses, step + 1, time.process_time() - started)
    return Trained(losses, None, time.process_time() - started)


def is_hopeless(losses: list[float]) -> bool:
    """Whether a run can be stopped: its loss is no number, or far above where it began."""
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-5:]
    return len(losses) >= 10 and sum(recent) / len(recent) > sum(losses[:2]) / 2 + HOPELESS_NATS


def trainable(model: nn.Module, task: Task) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained parameters of the head, and all others."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name: p for name, p in named.items() if any(f".{part}." in f".{name}" for part in task.head)}
    return head, {name: p for name, p in named.items() if name not in head}


def count_parameters(model: nn.Module, task: Task) -> dict[str, int]:
    """How many numbers are trained: by the method, and in the head that all methods share."""
    head, rest = trainable(model, task)
    return {
        "parameters": sum(parameter.numel() for parameter in rest.values()),
        "head_parameters": sum(parameter.numel() for parameter in head.values()),
    }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the weights file the method writes, head included."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, Path(folder) / "model.safetensors")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def thinned(losses: list[float]) -> list[list[float]]:
    """The curve of the training loss as [last step, mean loss] of about CURVE_POINTS equal stretches."""
    stretch = max(1, math.ceil(len(losses) / CURVE_POINTS))
    cuts = [(start, losses[start : start + stretch]) for start in range(0, len(losses), stretch)]
    return [[start + len(cut), sum(cut) / len(cut)] for start, cut in cuts]
