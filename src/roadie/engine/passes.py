"""One forward, and one backward, over rows of many adapters, each with a loss of its own.

    rows, longest first, padded on the right  -->  hidden states [B, T, H] of all  -->  pieces of whole rows with one loss
        a piece: logits, logprobs, losses, and the gradient of its hidden states; then it is let go
    the gradients of all pieces  -->  one backward through the body

so that logits exist for tokens with a term, of one piece at a time. No attention mask is given: in a causal model no token sees
what stands to its right. Each row is one adapter's alone, so that adapters meet in no sum.

Legend: B rows, T tokens of the longest, H hidden features, n tokens with a term, K targets of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from roadie.bank.trainable import TrainableBank
from roadie.engine.head import Head
from roadie.engine.losses import Loss, Terms, token_losses
from roadie.logprobs import hidden_logprobs


class PlacedRow(NamedTuple):
    """A row, and the slot of its adapter."""

    terms: Terms
    slot: int


class RowResult(NamedTuple):
    """The loss of a row, a number; and the logprobs of its targets, as `Terms.spread` gives them, on the CPU."""

    loss: float
    logprobs: Tensor


class Passes:
    """Forward and backward passes through one model, of which `bank` is attached.

    logits_bytes: what the logits of a piece may take, in float32, at least those of one token.
    """

    def __init__(self, model: Any, bank: TrainableBank, logits_bytes: int) -> None:
        self._bank, self.head = bank, Head(model)
        self._device = model.device
        text = model.config.get_text_config()
        self.vocabulary_size: int = text.vocab_size
        self._pad = text.pad_token_id or 0
        self._most_tokens = max(1, logits_bytes // (4 * self.vocabulary_size))

    def run(self, rows: Sequence[PlacedRow], *, backward: bool) -> list[RowResult]:
        """The result of each row; backward: the gradients of the sum of their losses are added to the bank's tables."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].terms.tokens))
        ordered = [rows[index] for index in order]
        with torch.set_grad_enabled(backward):
            found = self._run(ordered, backward)
        results = dict(zip(order, found, strict=True))
        return [results[index] for index in range(len(rows))]

    def _run(self, rows: Sequence[PlacedRow], backward: bool) -> list[RowResult]:
        slots = torch.tensor([row.slot for row in rows], device=self._device)
        input_ids = self._collated(rows)
        with self._bank.routed(slots):
            whole = self.head.hidden(input_ids)
        hidden, width = whole.flatten(0, 1), input_ids.shape[1]
        gradient = torch.zeros_like(hidden) if backward else None
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for piece in _pieces(rows, self._most_tokens):
            results.update(self._piece(rows, piece, hidden.detach(), width, gradient))
        if gradient is not None and hidden.requires_grad:
            hidden.backward(gradient)
        return _on_cpu(rows, results)

    def _collated(self, rows: Sequence[PlacedRow]) -> Tensor:
        ids = torch.full((len(rows), len(rows[0].terms.tokens)), self._pad)
        for place, row in enumerate(rows):
            ids[place, : len(row.terms.tokens)] = row.terms.tokens
        return ids.to(self._device)

    def _piece(
        self, rows: Sequence[PlacedRow], piece: Sequence[int], hidden: Tensor, width: int, gradient: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """For each row its loss, and the logprobs ``[n, K]``; the gradient of the hidden states is added to `gradient`."""
        terms = [rows[place].terms for place in piece]
        numbers = torch.arange(len(piece)).repeat_interleave(torch.tensor([len(each.positions) for each in terms]))
        index = torch.cat([each.positions + place * width for each, place in zip(terms, piece, strict=True)])
        slots = torch.tensor([rows[place].slot for place in piece])[numbers]
        targets, values = (_joined([getattr(each, name) for each in terms]) for name in ("targets", "values"))
        index, numbers, slots, targets, values = (
            tensor.to(self._device, non_blocking=True) for tensor in (index, numbers, slots, targets, values)
        )
        chosen = hidden[index].requires_grad_(gradient is not None)
        logprobs = hidden_logprobs(chosen, self._logits_by(slots), targets, self._most_tokens)
        losses = token_losses(terms[0].loss, logprobs, values, numbers, len(piece))
        if gradient is not None:
            losses.sum().backward()
            assert chosen.grad is not None
            gradient.index_add_(0, index, chosen.grad)
        of_rows = torch.zeros(len(piece), device=self._device).index_add_(0, numbers, losses.detach())
        parts = logprobs.detach().split([len(each.positions) for each in terms])
        return {
            place: (of_rows[number], part[:, : each.targets.shape[1]])
            for number, (place, part, each) in enumerate(zip(piece, parts, terms, strict=True))
        }

    def _logits_by(self, slots: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Logits of hidden states whose adapters have these slots ``[n]``: the output embeddings may be adapted, too."""

        def logits(hidden: Tensor, place: slice) -> Tensor:
            if not self.head.is_all:
                return self.head.logits(hidden)
            with self._bank.routed(slots[place].unsqueeze(0)):
                return self.head.logits(hidden)

        return logits


def _pieces(rows: Sequence[PlacedRow], most_tokens: int) -> list[list[int]]:
    """Places of rows with terms: with one loss each, and of at most so many tokens with a term, or one row."""
    pieces: list[list[int]] = []
    places = [place for place, row in enumerate(rows) if len(row.terms.positions)]

    def kind(place: int) -> Loss:
        return rows[place].terms.loss

    for _, alike in groupby(sorted(places, key=kind), kind):
        count = most_tokens + 1
        for place in alike:
            count += len(rows[place].terms.positions)
            if count > most_tokens:
                pieces.append([])
                count = len(rows[place].terms.positions)
            pieces[-1].append(place)
    return pieces


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``[n, K]`` of several rows one after the other, with zeros where one has fewer columns."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([part if part.shape[1] == most else pad(part, (0, most - part.shape[1])) for part in parts])


def _on_cpu(rows: Sequence[PlacedRow], results: dict[int, tuple[Tensor, Tensor]]) -> list[RowResult]:
    """All of them in one go: whoever looks at a number on a device waits for it."""
    places = sorted(results)
    losses = torch.stack([results[place][0] for place in places]).tolist() if places else []
    flat = torch.cat([results[place][1].flatten() for place in places]).cpu() if places else torch.empty(0)
    parts = flat.split([results[place][1].numel() for place in places])
    found = {place: (loss, part) for place, loss, part in zip(places, losses, parts, strict=True)}
    return [_row_result(row.terms, *found.get(place, (0.0, torch.empty(0)))) for place, row in enumerate(rows)]


def _row_result(terms: Terms, loss: float, logprobs: Tensor) -> RowResult:
    return RowResult(loss, terms.spread(logprobs.view(terms.targets.shape)))
