"""The harness interleaves, and its intervals hold the ratio that was put into the times."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.harness import Budget, Rounds, measure, orders
from benchmarks.statistics import median_ratio, summarise
from tests.patience import HANG_S


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_cycle_of_orders_holds_every_place_and_every_successor_equally_often(count: int) -> None:
    names = [f"rival {index}" for index in range(count)]
    cycle = list(itertools.islice(orders(names), 2 * count if count % 2 else count))
    assert all(sorted(order) == names for order in cycle)
    places = Counter((place, name) for order in cycle for place, name in enumerate(order))
    assert len(places) == count**2
    assert len(set(places.values())) == 1
    successors = Counter(pair for order in cycle for pair in itertools.pairwise(order))
    assert len(successors) == count * (count - 1)
    assert len(set(successors.values())) <= 1


def test_every_round_calls_every_rival_once_in_another_order() -> None:
    calls: list[str] = []
    rivals = {name: lambda name=name: calls.append(name) for name in "abc"}
    budget = Budget(seconds=HANG_S, max_rounds=6, warm_up_calls=1, shortest_sample_s=0)
    rounds = measure(rivals, budget)
    assert rounds.count == 6
    timed = [calls[start : start + 3] for start in range(3, len(calls), 3)]  # after one warm-up of each
    assert len(timed) == 6
    assert all(sorted(one) == ["a", "b", "c"] for one in timed)
    assert len({tuple(one) for one in timed}) == 6


def test_the_garbage_collector_rests_while_the_clock_runs_and_works_again_afterwards() -> None:
    seen = []
    measure({"a": lambda: seen.append(gc.isenabled())}, Budget(0, min_rounds=2))
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 // 0}, Budget(0))
    assert gc.isenabled()


def test_the_time_is_kept_but_there_are_a_few_rounds_at_least_and_not_endlessly_many() -> None:
    assert measure({"a": lambda: None}, Budget(0, min_rounds=4)).count == 4
    assert measure({"a": lambda: None}, Budget(HANG_S, max_rounds=7)).count == 7


def test_short_calls_are_repeated_and_reported_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with the calls alone: two microseconds each."""
    now_s = [0.0]

    def run() -> None:
        now_s[0] += 2e-6

    monkeypatch.setattr("benchmarks.harness.time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    rounds = measure({"a": run}, Budget(0, min_rounds=3, shortest_sample_s=1e-3))
    assert rounds.calls in (500, 501)  # of a millisecond in all
    assert rounds.times_s["a"] == pytest.approx([2e-6] * 3)


def test_what_is_waited_for_is_waited_for_before_and_after_each_sample() -> None:
    events: list[str] = []
    budget = Budget(0, min_rounds=1, max_rounds=1, warm_up_calls=0)
    measure({"a": lambda: events.append("run")}, budget, lambda: events.append("wait"))
    assert events == ["wait", "run", "wait"]


def noisy_times(ratio: float, rounds: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A base and a rival `ratio` times as slow: the machine slows both down alike, and each has a little noise of its own."""
    draw = np.random.default_rng(7)
    machine = np.exp(draw.normal(0, 0.5, rounds))
    base, rival = (machine * np.exp(draw.normal(0, 0.02, rounds)) for _ in range(2))
    return base, ratio * rival


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
def test_a_known_ratio_is_found_with_a_narrow_interval_where_noise_is_common(ratio: float) -> None:
    base, rival = noisy_times(ratio)
    found = median_ratio(rival, base)
    # The standard error of a median, 1.25 sigma / sqrt(n), of the rivals' own noise: the machine's 50 % is not in it.
    error = 1.25 * 2**0.5 * 0.02 / 60**0.5
    assert abs(found["value"] / ratio - 1) < 3 * error
    assert found["low"] < found["value"] < found["high"]
    assert error < (found["high"] - found["low"]) / ratio < 6 * error


def test_intervals_are_95_percent_intervals() -> None:
    draw = np.random.default_rng(3)
    experiments = [np.exp(draw.normal(0, 0.1, 25)) for _ in range(300)]
    held = sum(found["low"] <= 1 <= found["high"] for found in (median_ratio(t, np.ones(25)) for t in experiments))
    # 300 experiments at 95 %: the standard deviation is 3.8, and the bootstrap of a median is a little generous.
    assert 270 <= held < 300


def test_equal_times_give_equal_intervals() -> None:
    base, rival = noisy_times(1.1)
    assert median_ratio(rival, base) == median_ratio(rival, base)


def test_the_summary_pairs_each_rival_with_the_base_and_with_ours() -> None:
    rounds = Rounds({"base": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 8.0], "theirs": [3.0, 6.0, 12.0]}, calls=1)
    found = summarise(rounds, "base", "ours")
    assert found["base"]["median_ms"] == 2000
    assert (found["base"]["q1_ms"], found["base"]["q3_ms"]) == (1500, 3000)
    assert found["ours"]["ratio"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert found["theirs"]["ratio_to_roadie"]["value"] == 1.5
    assert "ratio_to_roadie" not in found["ours"]


def test_time_is_that_of_the_processor_where_a_budget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("benchmarks.harness.time.thread_time", lambda: float(next(ticks)))
    rounds = measure({"a": lambda: None}, Budget(0, 2, 2, warm_up_calls=0, processor_time=True))
    assert rounds.times_s == {"a": [1.0, 1.0]}  # a tick between two looks at the clock
