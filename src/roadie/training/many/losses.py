"""The loss of each job in a batch of many: the mean over its own learnt tokens, so that the sum over jobs mixes nothing.

Legend: B rows, T tokens, V words, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from roadie.bank.trainable import TrainableBank
from roadie.distributed.processes import Processes
from roadie.training.encoding import IGNORED
from roadie.training.many.packing import Batch, Row, collate, learnt_tokens, pack


class ManyLosses:
    """Forward (and backward) passes over rows of many jobs, through one model with the bank attached.

    together: processes that share the rows. All are given all rows, and each takes its part; the losses are those of all.
    """

    def __init__(self, model: Any, bank: TrainableBank, max_tokens: int | None, together: Processes) -> None:
        self._model = model
        self._bank = bank
        self._max_tokens = max_tokens
        self._together = together
        self._pad = model.config.get_text_config().pad_token_id or 0

    def train(self, rows: Sequence[Row], num_slots: int) -> Tensor:
        """The loss of each slot ``[S]``; the gradients of this process's part of their sum are added to the bank's tables."""
        return self._losses(rows, num_slots, backward=True)

    def evaluate(self, rows: Sequence[Row], num_slots: int) -> Tensor:
        """The loss of each slot ``[S]``, 0 for a slot without rows; no gradients."""
        with torch.no_grad():
            return self._losses(rows, num_slots, backward=False)

    def _losses(self, rows: Sequence[Row], num_slots: int, *, backward: bool) -> Tensor:
        device = self._model.device
        tokens = [0] * num_slots
        for row in rows:
            tokens[row.slot] += learnt_tokens(row.example)
        weights_S = torch.tensor([1 / max(1, count) for count in tokens], dtype=torch.float64).to(device, torch.float32)
        losses_S = torch.zeros(num_slots, device=device)
        for some in pack(self._own(rows), self._max_tokens):
            batch = collate(some, self._pad, device)
            with self._bank.routed(batch.slots):
                losses_B = self._row_losses(batch) * weights_S[batch.slots]
                if backward:
                    losses_B.sum().backward()
            losses_S.index_add_(0, batch.slots, losses_B.detach())
        return self._together.sum_(losses_S)

    def _own(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of this process: of each length about as many as the others have."""
        if self._together.count == 1:
            return rows
        ordered = sorted(rows, key=lambda row: -len(row.example.input_ids))
        return ordered[self._together.rank :: self._together.count]

    def _row_losses(self, batch: Batch) -> Tensor:
        """The summed loss of each row ``[B]``, float32."""
        logits_BTV = self._model(input_ids=batch.input_ids, use_cache=False).logits
        losses = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), batch.targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        return losses.view(batch.targets.shape).sum(dim=1)
