"""One run on any device: the steps of `benchmarks.quality.training`, with accumulation, schedules and checkpointing.

No dropout, whatever the model's own configuration. The loss of a step is the mean over all predictions of its rows, so
that how many of them fit into memory at once changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from benchmarks.quality.hub.evaluation import Judge, moved
from benchmarks.quality.hub.settings import Training
from benchmarks.quality.methods import Method
from benchmarks.quality.search import cost
from benchmarks.quality.tasks import IGNORED, LANGUAGE, Batch, Task, collate, tally
from benchmarks.quality.training import (
    Trained,
    count_parameters,
    draws,
    is_hopeless,
    start_head,
    stored_bytes,
    thinned,
    trainable,
)


def run(
    task: Task,
    training: Training,
    judge: Judge,
    method: Method,
    learning_rate: float,
    seed: int,
    model: nn.Module,
    beaten_at: float = math.inf,
) -> dict[str, Any]:
    """Adapt, train and measure `model`, which is changed; gives the part of the record that the run itself knows.

    A run whose validation cost is above `beaten_at` is not tested.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    start_head(model, task, seed)
    adapted = method.adapt(model, task)
    trained: list[Trained] = []
    started = time.perf_counter()
    peak = peak_of(
        adapted, lambda: trained.append(train(task, training, adapted, learning_rate, seed, method.rate_shares))
    )
    wall_s = time.perf_counter() - started
    (done,) = trained
    validation = None if done.stopped_at is not None else judge(task, adapted, "validation")
    return {
        **count_parameters(adapted, task),
        "stored_bytes": stored_bytes(adapted),
        "processor_s": done.processor_s,
        "wall_s": wall_s,
        "peak_bytes": peak,
        "stopped_at": done.stopped_at,
        "curve": thinned(done.losses),
        "validation": validation,
        "test": judge(task, adapted, "test") if validation and cost(validation) <= beaten_at else None,
    }


def peak_of(model: nn.Module, run: Callable[[], object]) -> int:
    """On a GPU all that is allocated at the most, the model included; else how far the process rises above its start."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def share_of_peak_rate(training: Training, step: int, steps: int) -> float:
    """The share of the peak rate at a step: up over the warm-up, then by the schedule; linear reaches 0 after the last."""
    warm_up = math.ceil(training.warm_up * steps)
    if step < warm_up:
        return (step + 1) / warm_up
    if training.schedule == "constant":
        return 1.0
    done = (step - warm_up) / max(1, steps - warm_up)
    return (1 - done) if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def train(
    task: Task,
    training: Training,
    model: nn.Module,
    learning_rate: float,
    seed: int,
    rate_shares: Mapping[str, float] | None = None,
) -> Trained:
    """All steps, or those until the loss says that nothing will come of it; rate_shares: as a `Method` has them."""
    head, rest = trainable(model, task)
    optimizer = _optimizer(training, head, rest, learning_rate, rate_shares or {})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak_rate(training, step, task.steps))
    _set_up(model, training)
    losses: list[float] = []
    steps = pieces(task, training.accumulation, seed)
    started = time.process_time()
    for step in range(task.steps):
        losses.append(backward(task, model, [moved(piece, model) for piece in next(steps)]))
        if training.clip:
            nn.utils.clip_grad_norm_([*rest.values(), *head.values()], training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if is_hopeless(losses):
            return Trained(losses, step + 1, time.process_time() - started)
    return Trained(losses, None, time.process_time() - started)


def backward(task: Task, model: nn.Module, pieces: list[Batch]) -> float:
    """The gradients of a step, and its loss: the mean over the predictions of all pieces."""
    counts = [predictions(task, piece) for piece in pieces]
    total = 0.0
    for piece, count in zip(pieces, counts, strict=True):
        if count:
            loss: Tensor = tally(task, model, piece).loss * (count / sum(counts))
            loss.backward()
            total += float(loss.detach())
    return total


def predictions(task: Task, batch: Batch) -> int:
    """How many tokens, classes or numbers are predicted in a batch."""
    if task.kind == LANGUAGE:
        return int((batch["labels"][:, 1:] != IGNORED).sum())
    return len(batch["labels"])


def pieces(task: Task, count: int, seed: int) -> Iterator[list[Batch]]:
    """Without end: the rows of a step in `count` batches, those of about the same length together, so that little is padding."""
    size = task.batch_rows
    for rows in draws(task, size * count, seed):
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        yield [collate(ordered[start : start + size], task.pad_id) for start in range(0, size * count, size)]


def _optimizer(
    training: Training,
    head: dict[str, nn.Parameter],
    rest: dict[str, nn.Parameter],
    learning_rate: float,
    rate_shares: Mapping[str, float],
) -> torch.optim.Optimizer:
    head_rate = training.head_rate if rest and training.head_rate else learning_rate
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in rest.items():
        share = next((share for part, share in rate_shares.items() if part in name.split(".")), 1.0)
        by_rate.setdefault(share * learning_rate, []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": parameters, "lr": one} for one, parameters in by_rate.items()]
    groups.append({"params": list(head.values()), "lr": head_rate})
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=training.weight_decay)


def _set_up(model: Any, training: Training) -> None:
    """Without dropout; checkpointing works in training mode only, so there the rates of dropout are set to 0."""
    model.eval()
    if training.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
