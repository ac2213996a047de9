"""The gradients of adapters that are trained together, for tests that look at those of one step."""

from __future__ import annotations

from torch import Tensor

from roadie.bank.trainable import TrainableBank


def collect_gradients(bank: TrainableBank) -> list[Tensor]:
    """Put the gradients of the tables into `Stack.gradients`, which are zero before; gives the squares of their norms."""
    parts = list(bank.gradients())
    for part in parts:
        part.add(range(len(part.names)))
    return [part.squares for part in parts]
