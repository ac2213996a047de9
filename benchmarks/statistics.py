"""Medians, spread, and bootstrap intervals of paired ratios; equal for equal times.

Legend: K rounds, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Rounds

SEED = 20240902
RESAMPLES = 2000
LEVEL = 0.95


def median_ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median over rounds of ``times[k] / base[k]``, and its 95 % bootstrap interval: {"value", "low", "high"}."""
    ratios_K = np.asarray(times) / np.asarray(base)
    picks_SK = np.random.default_rng(SEED).integers(0, len(ratios_K), size=(RESAMPLES, len(ratios_K)))
    medians_S = np.median(ratios_K[picks_SK], axis=1)
    low, high = np.quantile(medians_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(np.median(ratios_K)), "low": float(low), "high": float(high)}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent rows (Wilson's), between 0 and 1."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(rounds: Rounds, base: str, ours: str | None) -> dict[str, dict[str, Any]]:
    """For each rival: median and quartiles in ms, its ratio to `base`, and (where there is one) to `ours`."""
    return {name: _summary(name, rounds, base, ours) for name in rounds.times_s}


def _summary(name: str, rounds: Rounds, base: str, ours: str | None) -> dict[str, Any]:
    times = rounds.times_s[name]
    q1, median, q3 = (float(value) * 1e3 for value in np.quantile(times, [0.25, 0.5, 0.75]))
    summary = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "ratio": median_ratio(times, rounds.times_s[base])}
    if ours in rounds.times_s and name != ours:
        summary["ratio_to_roadie"] = median_ratio(times, rounds.times_s[ours])
    return summary
