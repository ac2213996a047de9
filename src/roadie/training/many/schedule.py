"""The learning rate of a job at each of its steps: warm-up from 0 to the peak, then constant, linear or cosine to 0.

The formulas are those of transformers' schedulers, so that a job trained here and one trained alone by Trainer agree.
"""

from __future__ import annotations

import math

from roadie.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of the step number `step` (from 0) of `steps`."""
    warmup = min(math.ceil(recipe.warmup_ratio * steps), steps - 1)  # a first warm-up step has a rate of 0
    if step < warmup:
        return recipe.peak_rate * step / warmup
    if recipe.schedule == "constant":
        return recipe.peak_rate
    progress = (step - warmup) / (steps - warmup)
    left = 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.peak_rate * left
