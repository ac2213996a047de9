"""What is learnt: rows of tokens in three splits, a model to adapt, and what its loss is.

A task is built once and used by all methods; `Task.model` gives a fresh copy of the base model each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Row = Mapping[str, Any]
Batch = dict[str, Tensor]
IGNORED = -100

LANGUAGE, CLASSIFICATION = "language", "classification"


@dataclass(frozen=True)
class Splits:
    """Rows to learn from, to choose a learning rate on, and to report; no file or module is in two of them."""

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    kind: LANGUAGE or CLASSIFICATION; width: hidden size of the model; targets: the modules that adapters adapt;
    head: names of modules that every method trains whole, at head_rate; steps, batch_rows: of a run; predicts_numbers:
    CLASSIFICATION by one logit, whose squared error is the loss; facts: counts for the report.
    """

    name: str
    kind: str
    title: str
    model: Callable[[], nn.Module]
    splits: Splits
    pad_id: int
    targets: str | list[str]
    steps: int
    batch_rows: int
    head: tuple[str, ...] = ()
    head_rate: float | None = None
    predicts_numbers: bool = False
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tally:
    """The mean loss of a batch (nats), over how many predictions, and how many of them were right."""

    loss: Tensor
    count: int
    correct: int


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows of different lengths as one batch, padded on the right; labels that are lists are padded with IGNORED."""
    fills = {"attention_mask": 0, "labels": IGNORED, "token_type_ids": 0}
    batch: Batch = {}
    for key, first in rows[0].items():
        if isinstance(first, (int, float)):
            batch[key] = torch.tensor([row[key] for row in rows])
            continue
        longest = max(len(row[key]) for row in rows)
        fill = fills.get(key.removeprefix("second_"), pad_id)
        batch[key] = torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])
    return batch


def tally(task: Task, model: nn.Module, batch: Batch) -> Tally:
    """One forward pass: next tokens for LANGUAGE, the class of the row (its own place, without labels) for CLASSIFICATION."""
    if task.kind == LANGUAGE:
        labels = batch["labels"][:, 1:]
        learnt = labels != IGNORED
        return _of_logits(next_logits(model, batch, learnt), labels[learnt])
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"] if "labels" in batch else torch.arange(len(logits))
    if task.predicts_numbers:
        return Tally(functional.mse_loss(logits[:, 0].float(), labels.float()), len(labels), 0)
    return _of_logits(logits, labels)


def next_logits(model: Any, batch: Batch, places: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of the tokens that follow the n `places` (a mask ``[rows, tokens - 1]``), row by row.

    The layer that gives the logits sees these places alone: of a short answer to a long prompt, all others would be computed
    for nothing, and in a small model with a large vocabulary that layer is a good part of the whole.
    """

    def keep(layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0][:, :-1][places],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits


def _of_logits(logits: Tensor, labels: Tensor) -> Tally:
    logits = logits.float()
    correct = int((logits.detach().argmax(-1) == labels).sum())
    return Tally(functional.cross_entropy(logits, labels), len(labels), correct)


def measured(task: Task, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
    """Loss (nats a prediction) and accuracy over all rows, in batches of rows of about the same length."""
    model.eval()
    loss = count = correct = 0.0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    with torch.inference_mode():
        for start in range(0, len(ordered), task.batch_rows):
            one = tally(task, model, collate(ordered[start : start + task.batch_rows], task.pad_id))
            loss, count, correct = loss + float(one.loss) * one.count, count + one.count, correct + one.correct
    return {"loss": loss / count, "accuracy": correct / count}
