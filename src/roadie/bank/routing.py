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
from dataclasses import dataclass

import torch
from torch import Tensor

from roadie.errors import RoutingError


@dataclass(frozen=True, eq=False)
class Choice:
    """The slots of one batch: int64 ``[B]``, or ``[B, T]`` for a slot a token; `expansion`: rows that generation makes of one."""

    slots: Tensor
    expansion: int = 1

    def of(self, y: Tensor) -> Tensor:
        """The slots for a layer's output y ``[B, ..., D]``, in the shape of y's first dimensions."""
        slots = self.slots
        if y.dim() > slots.dim() and y.shape[: slots.dim()] == slots.shape:
            return slots if slots.device == y.device else slots.to(y.device)
        if slots.dim() == 1 and self.expansion > 1 and y.dim() > 1 and y.shape[0] == len(slots) * self.expansion:
            return slots.repeat_interleave(self.expansion).to(y.device)
        raise RoutingError(
            f"got slots {tuple(slots.shape)} for a layer's output {tuple(y.shape)}; wanted a slot for each row, or for each "
            "token; a layer that flattens rows and tokens needs one for each token, and beams the expansion of `rows`"
        )


class BankRouting:
    """The choice in force for one model."""

    def __init__(self) -> None:
        self._here: ContextVar[Choice | None] = ContextVar("roadie_bank_rows", default=None)
        self._compiled: Choice | None = None

    def current(self) -> Choice | None:
        """What the calling thread chose; what the last thread chose, in a compiled model."""
        return self._compiled if torch.compiler.is_compiling() else self._here.get()

    @contextmanager
    def in_force(self, choice: Choice) -> Iterator[None]:
        """Within the block the choice holds."""
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
