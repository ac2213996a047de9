"""The learning rate that fits a model, from its width; needs no torch. Where the rule comes from: docs/recipe.md."""

from __future__ import annotations

import math

PAPER_RATE, PAPER_WIDTH = 3e-3, 4096
LOWEST_RATE, HIGHEST_RATE = 1e-3, 1.2e-2
"""The lowest rate that the paper searched, and what the rule gives at 256, the smallest width that was measured."""


def default_learning_rate(hidden_size: int | None) -> float:
    """The peak learning rate for a model whose hidden states have so many elements; None, where that is unknown: 3e-3.

    3e-3 * sqrt(4096 / hidden_size), rounded to two digits, between 1e-3 and 1.2e-2. Source: docs/recipe.md.
    """
    if not hidden_size:
        return PAPER_RATE
    rate = PAPER_RATE * math.sqrt(PAPER_WIDTH / hidden_size)
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.2g}")
