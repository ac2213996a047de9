"""The metrics of a configuration, in numpy; and answers found in generated text.

All metrics are better when larger. Matthews is the multi-class R_K, which is the usual one for two classes; one that is
not defined (a constant prediction or reference) counts as 0, as in GLUE's own scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.quality.hub.settings import Metric

BEFORE, AFTER = " \t\n$", " \t\n.!?$%"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(/\d+)?")


def accuracy(predicted: ArrayLike, wanted: ArrayLike) -> float:
    """The share of predictions that are right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(wanted)))


def f1(predicted: ArrayLike, wanted: ArrayLike) -> float:
    """The harmonic mean of precision and recall of class 1."""
    ours, theirs = np.asarray(predicted) == 1, np.asarray(wanted) == 1
    total = ours.sum() + theirs.sum()
    return float(2 * (ours & theirs).sum() / total) if total else 0.0


def matthews(predicted: ArrayLike, wanted: ArrayLike) -> float:
    """The correlation of predicted and wanted classes: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)).

    s rows, c of them right; p and t: how often each class is predicted, and wanted.
    """
    ours, theirs = np.asarray(predicted), np.asarray(wanted)
    classes = np.union1d(ours, theirs)
    p = np.array([(ours == one).sum() for one in classes], dtype=float)
    t = np.array([(theirs == one).sum() for one in classes], dtype=float)
    rows, right = float(len(ours)), float((ours == theirs).sum())
    spread = (rows**2 - p @ p) * (rows**2 - t @ t)
    return float((right * rows - p @ t) / np.sqrt(spread)) if spread else 0.0


def pearson(predicted: ArrayLike, wanted: ArrayLike) -> float:
    """The linear correlation."""
    ours, theirs = (np.asarray(values, dtype=float) - np.mean(values) for values in (predicted, wanted))
    scale = np.sqrt((ours @ ours) * (theirs @ theirs))
    return float(ours @ theirs / scale) if scale else 0.0


def spearman(predicted: ArrayLike, wanted: ArrayLike) -> float:
    """The linear correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(wanted))


def _ranks(values: ArrayLike) -> ArrayLike:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: ArrayLike = (last - (counts - 1) / 2)[inverse]
    return ranks


OF_CLASSES = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
OF_NUMBERS = {"pearson": pearson, "spearman": spearman}


def exact_match(metric: Metric, generated: Sequence[str], references: Sequence[str]) -> float:
    """The share of generated texts whose answer is that of the reference."""
    pairs = zip(generated, references, strict=True)
    return sum(is_right(metric, one, reference) for one, reference in pairs) / len(references)


def is_right(metric: Metric, generated: str, reference: str) -> bool:
    """Whether the answer in a generated text is that of the reference; a text without an answer is wrong."""
    assert metric.pattern is not None
    ours = found(metric.pattern, metric.take, generated)
    theirs = found(metric.wanted, metric.take, reference) if metric.wanted else reference
    if ours is None or theirs is None:
        return False
    if metric.compare == "number":
        one, other = number(ours), number(theirs)
        if one is not None and other is not None:
            return abs(one - other) <= Fraction(metric.tolerance)
    return ours.strip() == theirs.strip()


def found(pattern: str, take: str, text: str) -> str | None:
    """The first or last match of a pattern (its group, where it has one), or None."""
    matches = re.findall(pattern, text)
    return str(matches[0 if take == "first" else -1]) if matches else None


def number(text: str) -> Fraction | None:
    """The number that a text is ("1,234.50", "$5.", "50%", "3/4"), or None; a percent sign is passed over."""
    plain = text.lstrip(BEFORE).rstrip(AFTER).replace(",", "")
    try:
        return Fraction(plain) if NUMBER.fullmatch(plain) else None
    except (ValueError, ZeroDivisionError):
        return None
