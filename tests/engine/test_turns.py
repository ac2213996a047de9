"""Whose turn it is: shares of time over a simulated clock, and first tokens that are not late."""

from __future__ import annotations

import pytest

from roadie.engine.turns import FIRST_TOKENS, IDLE_AFTER_S, MOST_OWED_S, Turns, TurnSettings
from roadie.errors import ConfigError

STEP_S, PASS_S, TOKENS = 0.02, 0.3, 3000


def spent(turns: Turns, seconds: float) -> tuple[float, float]:
    """Seconds of training and of sampling, where both always wait and nobody waits for a first token."""
    training = sampling = 0.0
    while training + sampling < seconds:
        if turns.is_trainings(None):
            training += PASS_S
            turns.trained(PASS_S, TOKENS, sampling_waits=True)
        else:
            sampling += STEP_S
            turns.sampled(STEP_S, training_waits=True)
    return training, sampling


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_shares_hold_up_to_a_pass(share):
    training, sampling = spent(Turns(TurnSettings(share)), 100.0)
    assert abs(training - share * (training + sampling)) <= PASS_S + STEP_S


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_all_or_nothing(share, expected):
    training, sampling = spent(Turns(TurnSettings(share)), 10.0)
    assert training / (training + sampling) == expected


def test_idleness_earns_and_costs_nothing():
    turns = Turns(TurnSettings(0.25))
    for _ in range(1000):
        turns.sampled(STEP_S, training_waits=False)
    assert turns.owed_s == 0
    turns.trained(50.0, TOKENS, sampling_waits=False)
    assert turns.owed_s == 0
    training, sampling = spent(turns, 100.0)
    assert abs(training - 0.25 * (training + sampling)) <= PASS_S + STEP_S


def test_a_gap_between_requests_is_not_idleness():
    now_s = [100.0]
    turns = Turns(TurnSettings(0.25), lambda: now_s[0])
    assert not turns.has_just_sampled
    turns.sampled(STEP_S, training_waits=False)
    assert turns.has_just_sampled
    assert turns.pause_s == 0, "nothing was spent"
    turns.trained(PASS_S, TOKENS, sampling_waits=True)
    assert turns.pause_s == pytest.approx(IDLE_AFTER_S)
    now_s[0] += IDLE_AFTER_S / 2
    assert turns.pause_s == pytest.approx(IDLE_AFTER_S / 2)
    now_s[0] += IDLE_AFTER_S
    assert turns.pause_s == 0
    assert not turns.has_just_sampled


def test_no_pass_makes_a_first_token_late_and_the_share_comes_after_that():
    turns = Turns(TurnSettings(0.5, latest_first_token_s=0.5))
    assert turns.max_tokens(None) == FIRST_TOKENS
    turns.sampled(0.1, training_waits=True)
    turns.trained(0.2, 1000, sampling_waits=False)  # 5000 tokens a second
    turns.sampled(0.1, training_waits=True)
    assert turns.is_trainings(None)
    assert turns.max_tokens(None) == pytest.approx(5000 * (0.5 - 0.1), abs=1)
    assert turns.max_tokens(0.3) == pytest.approx(5000 * (0.5 - 0.1 - 0.3), abs=1)
    assert turns.is_trainings(0.3)
    assert not turns.is_trainings(0.45)
    for _ in range(200):
        turns.sampled(0.1, training_waits=True)
    assert turns.owed_s == MOST_OWED_S
    assert not turns.is_trainings(0.45)
    assert turns.max_tokens(9.0) == 1


def test_without_a_latest_first_token_passes_are_as_long_as_they_are():
    turns = Turns(TurnSettings(0.5))
    turns.trained(10.0, 10, sampling_waits=True)
    assert turns.max_tokens(None) is None


@pytest.mark.parametrize("wrong", [{"training_share": 1.5}, {"training_share": True}, {"latest_first_token_s": -1.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=f"got {next(iter(wrong))}="):
        TurnSettings(**wrong)
