"""Which slot each row of a batch uses, in a model that a bank serves.

`rows` puts the choice in force for a block; the layers' hooks read it. In eager mode the choice belongs to the thread (or
task) that made it, so that several can run one model at a time; a compiled model reads it from a plain attribute, which one
thread at a time may set.

Legend: B rows of the batch, T tokens, S slots; -1 is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from roadie.bank.layout import Choice
from roadie.errors import RoutingError


class BankRouting:
    """The choice in force for one model."""

    def __init__(self) -> None:
        self._here: ContextVar[Choice | None] = ContextVar("roadie_bank_rows", default=None)
        self._compiled: Choice | None = None

    def current(self) -> Choice | None:
        """What the calling thread chose; what the last thread chose, in a compiled model."""
        return self._compiled if torch.compiler.is_compiling() else self._here.get()

    @contextmanager
    def in_force(self, choice: Choice | None) -> Iterator[None]:
        """Within the block the choice holds; None: nobody chose."""
        token, before = self._here.set(choice), self._compiled
        self._compiled = choice
        try:
            yield
        finally:
            self._compiled = before
            self._here.reset(token)


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Raise `RoutingError` unless slots are int64 from -1 to num_slots - 1."""
    if slots.dtype != torch.int64 or slots.dim() == 0:
        raise RoutingError(f"got slots of {slots.dtype} {tuple(slots.shape)}; wanted an int64 tensor [B] or [B, T]")
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= num_slots):
        raise RoutingError(
            f"got slots from {int(slots.min())} to {int(slots.max())}; wanted -1 (the base model) to {num_slots - 1}"
        )
