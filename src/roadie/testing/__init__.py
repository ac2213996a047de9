"""Helpers for tests and benchmarks, of roadie and of those who build on it.

`stock_peft` gives PEFT's own RoAd back for a block, so that nothing is ever compared with itself; `tiny_llama` makes a
model in milliseconds; `randomise` gives adapters something to do, `random_adapter` makes one; `assert_as_accurate_as` compares
errors instead of tuning tolerances.
"""

from __future__ import annotations

from roadie.testing.accuracy import assert_as_accurate_as, relative_error
from roadie.testing.models import random_adapter, randomise, tiny_llama
from roadie.testing.rival import stock_peft

__all__ = [
    "assert_as_accurate_as",
    "random_adapter",
    "randomise",
    "relative_error",
    "stock_peft",
    "tiny_llama",
]
