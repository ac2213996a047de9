"""Greedy tokens against a reference: each must be the argmax, given the same prefix, of the model with that adapter alone.

Two computations in one dtype may break a tie differently. A token that is not the reference's argmax is a tie only if, in
float64, its logit is below the largest by no more than both computations may be off: twice the error of the reference itself,
measured against float64 on the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roadie.adapter import Adapter
from roadie.bank import AdapterBank, Wish


@dataclass(frozen=True)
class GreedyVerdict:
    """How many tokens were compared, were ties, and were wrong; worst_gap: the largest float64 gap of a tie or wrong token."""

    num_tokens: int = 0
    num_ties: int = 0
    num_wrong: int = 0
    worst_gap: float = 0.0

    def __add__(self, other: GreedyVerdict) -> GreedyVerdict:
        return GreedyVerdict(
            self.num_tokens + other.num_tokens,
            self.num_ties + other.num_ties,
            self.num_wrong + other.num_wrong,
            max(self.worst_gap, other.worst_gap),
        )


class GreedyReference:
    """A copy of a plain model with these adapters, each row alone."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self._model = copy.deepcopy(model).eval()
        self._bank = _bank(self._model, adapters, torch.float32)
        self._adapters = adapters
        self._wide: tuple[Any, AdapterBank] | None = None

    def check(self, prompt_ids: Sequence[int], wish: Wish, token_ids: Sequence[int]) -> GreedyVerdict:
        """Compare a greedy continuation token by token."""
        if not token_ids:
            return GreedyVerdict()
        logits = _teacher_forced(self._model, self._bank, prompt_ids, wish, token_ids)
        chosen = torch.tensor(list(token_ids))
        differing = (logits.argmax(-1) != chosen).nonzero().flatten().tolist()
        if not differing:
            return GreedyVerdict(len(token_ids))
        wide = _teacher_forced(*self._in_float64(), prompt_ids, wish, token_ids)
        allowed = 2 * float((logits.double() - wide).abs().max())
        gaps = [float(wide[place].max() - wide[place, chosen[place]]) for place in differing]
        num_ties = sum(gap <= allowed for gap in gaps)
        return GreedyVerdict(len(token_ids), num_ties, len(gaps) - num_ties, max(gaps))

    def _in_float64(self) -> tuple[Any, AdapterBank]:
        if self._wide is None:
            self._bank.close()
            wide = copy.deepcopy(self._model).double()
            self._bank = _bank(self._model, self._adapters, torch.float32)
            self._wide = wide, _bank(wide, self._adapters, torch.float64)
        return self._wide


def _bank(model: Any, adapters: Mapping[str, Adapter], dtype: torch.dtype) -> AdapterBank:
    bank = AdapterBank(model, max(2, 2 * len(adapters)), dtype=dtype)
    for name, adapter in adapters.items():
        bank.admit(name, adapter)
    return bank


def _teacher_forced(
    model: Any, bank: AdapterBank, prompt_ids: Sequence[int], wish: Wish, token_ids: Sequence[int]
) -> Tensor:
    """The logits before each token of the continuation, ``[len(token_ids), V]``."""
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    with torch.no_grad(), bank.rows([wish]):
        logits: Tensor = model(ids).logits
    return logits[0, len(prompt_ids) - 1 : -1]
