"""The next token: rules do what they say, draws follow the probabilities, and a row does not depend on its neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from roadie.errors import ConfigError
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


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Of the prompt and of what was said, row by row, each row by its own."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator) * 4
    prompts = torch.randint(0, 50, (3, 12), generator=generator)
    rules = Sampling(temperature=0.0, repetition_penalty=penalty)
    rows = [RowSampler(rules, prompts[0].tolist()), RowSampler(Sampling(temperature=0.0)), RowSampler(rules, [])]
    said: list[list[int]] = [prompts[0].tolist(), [], []]
    for _ in range(8):
        before = logits.clone()
        tokens = [chosen.token_id for chosen in choose(logits, rows)]
        assert torch.equal(logits, before)
        for place in (0, 2):
            wanted = logits[place : place + 1]
            if said[place]:
                wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([said[place]]), wanted.clone())
            adjusted = logits[place].clone()
            other = RowSampler(rules, said[place])
            other.adjust(adjusted)
            assert torch.equal(adjusted, wanted[0])
            assert tokens[place] == int(wanted[0].argmax())
            said[place].append(tokens[place])
        assert tokens[1] == int(logits[1].argmax())


def test_nothing_ends_before_the_fewest_tokens() -> None:
    rules = Sampling(temperature=0.0, min_tokens=3, max_tokens=9, repetition_penalty=1.1)
    row, wanted = RowSampler(rules, ends=(0, 2)), MinNewTokensLengthLogitsProcessor(0, 3, [0, 2], device="cpu")
    for number in range(5):
        adjusted = LOGITS[None].clone()
        row.adjust(adjusted[0])
        expected = wanted(torch.zeros(1, number, dtype=torch.int64), LOGITS[None].clone())
        assert (adjusted.isinf() == expected.isinf()).all()
        token = choose(LOGITS[None], [row])[0].token_id
        assert (token in (0, 2)) == (number >= 3)
    drawn_row = RowSampler(Sampling(seed=0, min_tokens=DRAWS, max_tokens=DRAWS, temperature=2.0), ends=(0,))
    assert 0 not in [choose(LOGITS[None], [drawn_row])[0].token_id for _ in range(500)]


def test_rules_out_of_range_are_refused() -> None:
    bad = (
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
    )
    for rules in bad:
        with pytest.raises(ConfigError, match=next(iter(rules))):
            Sampling(**rules)  # type: ignore[arg-type]
