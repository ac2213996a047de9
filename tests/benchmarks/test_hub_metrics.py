"""Metrics against values worked out by hand, and answers found in text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.quality.hub import metrics
from benchmarks.quality.hub.evaluation import scores_of_logits
from benchmarks.quality.hub.settings import Metric
from scipy import stats
from torch import tensor

PREDICTED, WANTED = (
    [1, 1, 1, 0, 0, 0, 0, 1],
    [1, 1, 0, 0, 0, 0, 1, 0],
)  # 2 true positives, 2 false, 1 missed, 3 true negatives


def test_metrics_of_two_classes_by_hand() -> None:
    assert metrics.accuracy(PREDICTED, WANTED) == 5 / 8
    assert metrics.f1(PREDICTED, WANTED) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert metrics.matthews(PREDICTED, WANTED) == pytest.approx((2 * 3 - 2 * 1) / math.sqrt(4 * 3 * 5 * 4))


def test_matthews_of_three_classes_is_the_correlation_of_their_indicators() -> None:
    predicted, wanted = np.array([0, 1, 2, 2, 1, 0, 0]), np.array([0, 2, 2, 1, 1, 0, 2])
    one, other = np.eye(3)[predicted], np.eye(3)[wanted]
    cross = ((one - one.mean(0)) * (other - other.mean(0))).sum()
    scale = ((one - one.mean(0)) ** 2).sum() * ((other - other.mean(0)) ** 2).sum()
    assert metrics.matthews(predicted, wanted) == pytest.approx(cross / math.sqrt(scale))


def test_metrics_that_are_not_defined_are_zero() -> None:
    assert metrics.matthews([1, 1], [0, 1]) == metrics.f1([0, 0], [0, 0]) == metrics.pearson([1, 1], [0, 1]) == 0.0


def test_correlations() -> None:
    one, other = [1.0, 2.0, 2.0, 4.0, 0.5], [0.1, 0.3, 0.9, 0.7, 0.2]
    assert metrics.pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / math.sqrt(2 * 38 / 3))
    assert metrics.pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic)
    assert metrics.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert metrics.spearman([1, 2, 3], [1, 100, 1000]) == pytest.approx(1.0)


def test_scores_of_logits() -> None:
    scores = scores_of_logits(tensor([[0.0, 1.0], [2.0, 0.0]]), tensor([1, 1]), predicts_numbers=False)
    assert scores["accuracy"] == 0.5
    assert scores["loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)
    assert "f1" not in scores_of_logits(tensor([[0.0, 1.0, 2.0]]), tensor([1]), predicts_numbers=False)
    numbers = scores_of_logits(tensor([[1.0], [3.0]]), tensor([2.0, 5.0]), predicts_numbers=True)
    assert (numbers["loss"], numbers["pearson"]) == (2.5, pytest.approx(1.0))


TEXT = Metric(kind="exact_match", pattern=r"answer is (\w+)", take="first")
NUMBER = Metric(
    kind="exact_match", pattern=r"-?\d[\d,]*\.?\d*", wanted=r"####\s*(\S+)", compare="number", tolerance=0.001
)


def test_answers_in_text() -> None:
    assert metrics.is_right(TEXT, "the answer is yes, or the answer is no", "yes")
    assert not metrics.is_right(TEXT, "the answer is no, or the answer is yes", "yes")
    assert not metrics.is_right(TEXT, "yes", "yes")  # no match of the pattern
    assert metrics.exact_match(TEXT, ["answer is a", "answer is b", ""], ["a", "a", "a"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        ("3 and 4 make 1,007.", "so #### 1007", True),
        ("it is 7.0005", "#### 7", True),
        ("it is 7.002", "#### 7", False),
        ("-5", "#### 5", False),
        ("seven", "#### 7", False),
        ("7", "there is no mark", False),
    ],
)
def test_numbers_in_text(generated: str, reference: str, right: bool) -> None:
    assert metrics.is_right(NUMBER, generated, reference) is right


def test_what_a_number_is() -> None:
    written = ["1,234.50", " $5. ", "50%", "3/4", ".5", "-2"]
    assert [float(metrics.number(text) or 0) for text in written] == [1234.5, 5.0, 50.0, 0.75, 0.5, -2.0]
    assert [metrics.number(text) for text in ("", "x", "1/0", "1e999999999", "1.2.3")] == [None] * 5
