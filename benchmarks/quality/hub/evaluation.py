"""How good a model is on a part: the loss, and the metric of the configuration; answers are generated greedily, in batches.

Scores are a mapping: "loss" (nats a prediction, or the squared error), the metrics by name, and "cost", which is lower
for the better model: the metric with its sign turned, or the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from benchmarks.quality.hub import metrics
from benchmarks.quality.hub.data import Table
from benchmarks.quality.hub.encoding import Encoded, Encoder
from benchmarks.quality.hub.settings import Metric, TaskSettings
from benchmarks.quality.tasks import IGNORED, Row, Task, collate, next_logits, tally

Scores = dict[str, Any]
VALIDATION, TESTS = "validation", "tests."
SHOWN_ANSWERS, SHOWN_CHARACTERS = 2, 300


@dataclass(frozen=True)
class Judge:
    """What it takes to measure a model of a task."""

    settings: TaskSettings
    encoder: Encoder
    parts: dict[str, Table]

    def __call__(self, task: Task, model: nn.Module, split: str) -> Scores:
        """The scores of "validation", or of "test": the means over all tests, and those of each under "sets"."""
        if split == VALIDATION:
            return self._of_part(task, model, VALIDATION)
        sets = {name: self._of_part(task, model, TESTS + name) for name in self.settings.tests}
        shared = [key for key in next(iter(sets.values())) if all(_is_number(one.get(key)) for one in sets.values())]
        return {**{key: mean(one[key] for one in sets.values()) for key in shared}, "sets": sets}

    def _of_part(self, task: Task, model: nn.Module, name: str) -> Scores:
        table, metric = self.parts[name], self.settings.metric_of(self.settings.parts[name])
        model.eval()
        with torch.inference_mode():
            if self.settings.model.kind == "sequence-classification":
                scores = self._of_classes(task, model, table)
            elif metric.kind == "choice":
                scores = self._of_choices(task, model, table)
            else:
                scores = {"loss": self._loss(task, model, table)}
                if metric.kind == "exact_match":
                    scores |= self._of_answers(task, model, table, metric)
        return {**scores, "cost": scores["loss"] if metric.kind == "loss" else 0.0 - scores[metric.kind]}

    def _loss(self, task: Task, model: nn.Module, table: Table) -> float:
        """The mean over all learnt tokens."""
        loss = count = 0.0
        for rows in self._batches(Encoded(table, self.encoder)):
            one = tally(task, model, moved(collate(rows, task.pad_id), model))
            loss, count = loss + float(one.loss) * one.count, count + one.count
        return loss / count

    def _of_classes(self, task: Task, model: nn.Module, table: Table) -> Scores:
        logits, labels = [], []
        for rows in self._batches(Encoded(table, self.encoder)):
            batch = moved(collate(rows, task.pad_id), model)
            labels.append(batch.pop("labels").cpu())
            logits.append(model(**batch).logits.float().cpu())
        return scores_of_logits(torch.cat(logits), torch.cat(labels), self.settings.rows.labels == "number")

    def _of_choices(self, task: Task, model: nn.Module, table: Table) -> Scores:
        """The loss of the right answers, and in how many rows one of them is likelier than every other.

        The loss has the end of the text in it; the likelihood is the mean over the answer's own words.
        """
        listed = [(index, *choice) for index, raw in enumerate(table) for choice in self.encoder.choices(raw)]
        rows = {id(row): (index, right) for index, row, right in listed}
        best = [{True: math.inf, False: math.inf} for _ in table]
        loss = count = 0.0
        for batch_rows in self._batches([row for _, row, _ in listed]):
            for row, losses in zip(batch_rows, losses_of_rows(model, task, batch_rows), strict=True):
                index, right = rows[id(row)]
                is_ended = row["labels"][-1] == self.encoder.tokenizer.eos_token_id
                best[index][right] = min(best[index][right], mean(losses[:-1] if is_ended else losses))
                loss, count = (loss + sum(losses), count + len(losses)) if right else (loss, count)
        return {"loss": loss / count, "choice": mean(float(one[True] < one[False]) for one in best)}

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Rows of about the same length together, the longest first: what does not fit into memory fails at once."""
        size = self.settings.evaluation.batch_rows
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def _of_answers(self, task: Task, model: nn.Module, table: Table, metric: Metric) -> Scores:
        evaluation = self.settings.evaluation
        prompts = [self.encoder.prompt(raw) for raw in table]
        references = [self.encoder.reference(raw) for raw in table]
        decode = self.encoder.tokenizer
        texts = generate(
            model,
            prompts,
            decode=lambda tokens: decode.decode(tokens, skip_special_tokens=True),
            pad_id=task.pad_id,
            end_id=decode.eos_token_id,
            rows=evaluation.generation_rows,
            tokens=evaluation.generated_tokens,
        )
        shown = [
            {"generated": text[:SHOWN_CHARACTERS], "wanted": reference[:SHOWN_CHARACTERS]}
            for text, reference in zip(texts[:SHOWN_ANSWERS], references, strict=False)
        ]
        return {"exact_match": metrics.exact_match(metric, texts, references), "answers": shown}


def losses_of_rows(model: nn.Module, task: Task, rows: Sequence[Row]) -> list[list[float]]:
    """The losses of each row's learnt tokens (nats)."""
    batch = moved(collate(rows, task.pad_id), model)
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED
    losses = functional.cross_entropy(next_logits(model, batch, learnt).float(), labels[learnt], reduction="none")
    return [one.tolist() for one in losses.split(learnt.sum(-1).tolist())]


def scores_of_logits(logits: Tensor, labels: Tensor, predicts_numbers: bool) -> Scores:
    """Loss and metrics of logits [rows, classes] or [rows, 1] and labels [rows]."""
    if predicts_numbers:
        values, wanted = logits[:, 0].numpy(), labels.float()
        loss = float(functional.mse_loss(logits[:, 0], wanted))
        return {"loss": loss, **{name: of(values, wanted.numpy()) for name, of in metrics.OF_NUMBERS.items()}}
    predicted, loss = logits.argmax(-1).numpy(), float(functional.cross_entropy(logits, labels))
    two = logits.shape[-1] == 2
    wanted_metrics = {name: of for name, of in metrics.OF_CLASSES.items() if two or name != "f1"}
    return {"loss": loss, **{name: of(predicted, labels.numpy()) for name, of in wanted_metrics.items()}}


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Callable[[list[int]], str],
    pad_id: int,
    end_id: int | None,
    rows: int,
    tokens: int,
) -> list[str]:
    """What the model greedily adds to each prompt, at most `tokens` tokens; prompts padded on the left, `rows` at a time."""
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens, pad_token_id=pad_id, eos_token_id=end_id
    )
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = padded_left([prompts[index] for index in chosen], pad_id)
        added = model.generate(**moved(batch, model), generation_config=greedy)[:, batch["input_ids"].shape[1] :]
        for index, row in zip(chosen, added.tolist(), strict=True):
            texts[index] = decode(row[: row.index(end_id)] if end_id in row else row)
    return texts


def padded_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Token numbers and mask [rows, tokens] of prompts that all end at the right."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def moved(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of the model."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
