"""Rows of many jobs into batches of at most so many tokens.

Rows are padded on the right and no attention mask is given: in a causal model no token sees what stands to its right, and
padded tokens are in no loss. Each row is one job's alone, so that jobs meet in no sum.

Legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from roadie.training.encoding import IGNORED, Example


class Row(NamedTuple):
    """An example, and the slot of the job it belongs to."""

    example: Example
    slot: int


@dataclass(frozen=True, eq=False)
class Batch:
    """input_ids, targets ``[B, T]``, slots ``[B]``: int64; targets are the labels of the next tokens, `IGNORED` elsewhere."""

    input_ids: Tensor
    targets: Tensor
    slots: Tensor


def pack(rows: Sequence[Row], max_tokens: int | None) -> list[list[Row]]:
    """The rows in batches of at most `max_tokens` tokens with padding (None: one batch), longest rows first.

    A row that is longer than that has a batch of its own. The order is that of the lengths, then the one given.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.example.input_ids)):
        width = len(batches[-1][0].example.input_ids) if batches else 0
        if not batches or (max_tokens is not None and (len(batches[-1]) + 1) * width > max_tokens):
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(rows: Sequence[Row], pad_token_id: int, device: torch.device) -> Batch:
    """The tensors of one batch."""
    width = max(len(row.example.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids, targets = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    for place, (example, _) in enumerate(rows):
        length = len(example.input_ids)
        input_ids[place, :length] = torch.tensor(example.input_ids)
        targets[place, : length - 1] = torch.tensor(example.labels[1:])
    slots = torch.tensor([row.slot for row in rows])
    return Batch(input_ids.to(device), targets.to(device), slots.to(device))


def learnt_tokens(example: Example) -> int:
    """Tokens of an example that its loss is taken on."""
    return sum(label != IGNORED for label in example.labels[1:])
