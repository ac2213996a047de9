"""The learning rate that fits a model, from its width and its data; needs no torch. Source of the rule: docs/recipe.md."""

from __future__ import annotations

import math

PAPER_RATE, PAPER_WIDTH = 3e-3, 4096
LOWEST_RATE, HIGHEST_RATE = 1e-3, 1.2e-2
"""The lowest rate that the paper searched, and what the rule gives at 256, the smallest width that was measured."""
FEW_ROWS, FEW_STEPS = 1000, 20
"""Fewer rows than these, seen again in more steps than these, are learnt by heart at the rate of the width."""


def default_learning_rate(
    hidden_size: int | None, rows: int | None = None, passes: float = 1.0, batch_size: int = 32
) -> float:
    """The peak learning rate for a model whose hidden states have so many elements; None, where that is unknown: 3e-3.

    3e-3 * sqrt(4096 / hidden_size), between 1e-3 and 1.2e-2. Where fewer than 1,000 rows are seen more than once, in more
    than 20 steps, it is lower: times sqrt(rows / 1000), or times sqrt(20 / steps) where that is more. Rounded to two digits,
    never below 1e-3. rows: of the training data, None: enough; passes: over them; batch_size: rows of a step. Source:
    docs/recipe.md.
    """
    rate = PAPER_RATE * math.sqrt(PAPER_WIDTH / hidden_size) if hidden_size else PAPER_RATE
    rate = min(rate, HIGHEST_RATE) * _share_of_few(rows, passes, batch_size)
    return float(f"{max(rate, LOWEST_RATE):.2g}")


def _share_of_few(rows: int | None, passes: float, batch_size: int) -> float:
    """1 for many rows, for one pass and for few steps; less for few rows that many steps go through again and again."""
    if not rows or passes <= 1:
        return 1.0
    steps = passes * rows / batch_size
    return min(1.0, math.sqrt(max(rows / FEW_ROWS, FEW_STEPS / steps)))
