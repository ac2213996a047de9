"""The next token: rules do what they say, draws follow the probabilities, and a row does not depend on its neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadie.serving import Sampling
from roadie.serving.sampling import RowSampler, choose

PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float()
DRAWS = 4000


def drawn(rules: Sampling, number: int = DRAWS) -> torch.Tensor:
    """How often each token comes, in `number` draws of one request."""
    row = RowSampler(rules)
    tokens = [choose(LOGITS[None], [row])[0].token_id for _ in range(number)]
    return torch.bincount(torch.tensor(tokens), minlength=5).double() / number


def assert_follows(frequencies: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-squared over the tokens that can come; the bound is passed by chance once in 10^6 (4 degrees of freedom)."""
    possible = expected > 0
    assert float(frequencies[~possible].sum()) == 0
    chi2 = float((DRAWS * (frequencies - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi2 < 33.4


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.07, 0.03]),
        ({"temperature": 0.5}, [p**2 for p in (0.4, 0.3, 0.2, 0.07, 0.03)]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 0.69}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.2, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.6}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 1.0, "min_p": 0.6, "top_k": 4}, [0.4, 0.3, 0, 0, 0]),
        ({"logit_bias": {4: math.log(10)}}, [0.4, 0.3, 0.2, 0.07, 0.3]),
        ({"logit_bias": {0: -100.0}}, [0, 0.3, 0.2, 0.07, 0.03]),
    ],
)
def test_draws_follow_the_probabilities(rules: dict[str, object], expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert_follows(drawn(Sampling(seed=0, **rules)), wanted / wanted.sum())  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest_and_penalties_count_what_was_said() -> None:
    row = RowSampler(Sampling(temperature=0.0))
    assert [choose(LOGITS[None], [row])[0].token_id for _ in range(3)] == [0, 0, 0]
    row = RowSampler(Sampling(temperature=0.0, presence_penalty=2.0))
    assert [choose(LOGITS[None], [row])[0].token_id for _ in range(5)] == [0, 1, 2, 3, 0]
    row = RowSampler(Sampling(temperature=0.0, frequency_penalty=0.2))
    tokens = [choose(LOGITS[None], [row])[0].token_id for _ in range(4)]
    assert tokens == [0, 0, 1, 0]  # ln 0.4/0.3 = 0.288: less than two times 0.2


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 5))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, number: int, place: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, 50, generator=generator) * 3
    place %= number
    rules = [
        Sampling(seed=seed + other, top_p=0.8, top_k=other * 3, temperature=0.5 + other) for other in range(number)
    ]
    together = choose(logits, [RowSampler(rule) for rule in rules])
    alone = choose(logits[place : place + 1], [RowSampler(rules[place])])
    assert together[place] == alone[0]


def test_logits_are_left_alone_and_logprobs_are_those_of_the_model() -> None:
    before, rules = LOGITS.clone(), Sampling(temperature=0.1, seed=0, logit_bias={3: 50.0}, logprobs=2)
    chosen = choose(before[None], [RowSampler(rules)])[0]
    assert torch.equal(before, LOGITS)
    assert chosen.logprob is not None
    assert (chosen.token_id, chosen.logprob.logprob) == (3, pytest.approx(math.log(0.07), abs=1e-6))
    assert [token for token, _ in chosen.logprob.top] == [0, 1]


def test_values_that_are_not_finite_give_a_token_all_the_same() -> None:
    for value in (math.nan, math.inf):
        row = RowSampler(Sampling(seed=0))
        assert 0 <= choose(torch.full((1, 5), value), [row])[0].token_id < 5
