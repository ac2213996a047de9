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
from roadie.training.encoding import IGNORED
from roadie.training.many.packing import Batch, Row, collate, learnt_tokens, pack


class ManyLosses:
    """Forward (and backward) passes over rows of many jobs, through one model with the bank attached."""

    def __init__(self, model: Any, bank: TrainableBank, max_tokens: int | None) -> None:
        self._model = model
        self._bank = bank
        self._max_tokens = max_tokens
        self._pad = model.config.get_text_config().pad_token_id or 0

    def train(self, rows: Sequence[Row], num_slots: int) -> Tensor:
        """The loss of each slot ``[S]``; the gradients of their sum are added to those of the bank's tables."""
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
        for some in pack(rows, self._max_tokens):
            batch = collate(some, self._pad, device)
            with self._bank.routed(batch.slots):
                losses_B = self._row_losses(batch) * weights_S[batch.slots]
                if backward:
                    losses_B.sum().backward()
            losses_S.index_add_(0, batch.slots, losses_B.detach())
        return losses_S

    def _row_losses(self, batch: Batch) -> Tensor:
        """The summed loss of each row ``[B]``, float32."""
        logits_BTV = self._model(input_ids=batch.input_ids, use_cache=False).logits
        losses = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), batch.targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        return losses.view(batch.targets.shape).sum(dim=1)
