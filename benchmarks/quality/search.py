"""Which run comes next: the search for a learning rate with the first seed, then the other seeds at the best rate.

    next_run(records, method, kind, seeds) -> (exponent, seed), or None when the method is done for this task
    next_listed(records, method, rates, seeds) -> (rate, seed): the same where the rates to try are given

Pure functions of the records, so a run that was stopped goes on where it was. What is lowest is the validation loss, or
the "cost" of the scores where a task is judged by something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.methods import Method, rate

SEEDS = (0, 1, 2)
LOWEST, HIGHEST = -12, 2
TIE_BREAK = 1e-6
"""Of the loss beside a metric: too little to outweigh one row of a hundred thousand."""
Record = dict[str, Any]


def next_run(
    records: Sequence[Record], method: Method, kind: str, seeds: Sequence[int] = SEEDS
) -> tuple[int, int] | None:
    """The next exponent of the grid and seed to train, or None; `records`: the runs of this task."""
    scores = searched(records, method.name, seeds[0])
    exponent = _next_exponent(scores, method.first[kind])
    if exponent is not None:
        return exponent, seeds[0]
    best = min(scores, key=lambda one: scores[one])
    done = {record["seed"] for record in records if _is(record, method.name) and record["learning_rate"] == rate(best)}
    return next(((best, seed) for seed in seeds if seed not in done), None)


def next_listed(
    records: Sequence[Record], method: str, rates: Sequence[float], seeds: Sequence[int] = SEEDS
) -> tuple[float, int] | None:
    """The next of the given rates to try with the first seed, then the best of them with the others, or None."""
    scores = costs(records, method, seeds[0])
    untried = next((one for one in rates if one not in scores), None)
    if untried is not None:
        return untried, seeds[0]
    best = min(rates, key=lambda one: (scores[one], one))
    if math.isinf(scores[best]):
        return None  # everything diverged: other seeds would too
    done = {record["seed"] for record in records if _is(record, method) and record["learning_rate"] == best}
    return next(((best, seed) for seed in seeds if seed not in done), None)


def costs(records: Sequence[Record], method: str, seed: int) -> dict[float, float]:
    """What the runs of one seed cost on validation, by learning rate; infinite where the run was stopped."""
    return {
        record["learning_rate"]: cost(record["validation"])
        for record in records
        if _is(record, method) and record["seed"] == seed
    }


def cost(scores: Mapping[str, Any] | None) -> float:
    """The "cost", or the loss; of equal costs the loss decides. Infinite too where the loss was no number any more."""
    if not scores or scores["loss"] is None or scores.get("cost", 0) is None:
        return math.inf
    return float(scores["cost"] + TIE_BREAK * scores["loss"] if "cost" in scores else scores["loss"])


def searched(records: Sequence[Record], method: str, seed: int = SEEDS[0]) -> dict[int, float]:
    """Validation loss by exponent, of the runs of one seed; infinite where the run was stopped."""
    exponents = {rate(exponent): exponent for exponent in range(LOWEST, HIGHEST + 1)}
    return {exponents[one]: cost for one, cost in costs(records, method, seed).items() if one in exponents}


def best_exponent(records: Sequence[Record], method: str, seed: int = SEEDS[0]) -> int | None:
    """The exponent of the lowest validation loss, or None where nothing was trained to its end."""
    scores = {exponent: loss for exponent, loss in searched(records, method, seed).items() if math.isfinite(loss)}
    return min(scores, key=lambda one: scores[one]) if scores else None


def _next_exponent(scores: Mapping[int, float], first: int) -> int | None:
    """An exponent to try, or None when the best has a worse neighbour on both sides (or the grid ends there)."""
    if not scores:
        return first
    best = min(scores, key=lambda one: (scores[one], one))
    if math.isinf(scores[best]):
        best = min(scores)  # everything diverged: go down
    neighbours = (best - 1, best + 1)
    return next((one for one in neighbours if one not in scores and LOWEST <= one <= HIGHEST), None)


def _is(record: Record, method: str) -> bool:
    return bool(record["method"] == method)
