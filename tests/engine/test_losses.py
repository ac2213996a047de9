"""The losses: against their formulas, written out token by token, and what their rows must have."""

from __future__ import annotations

import math

import pytest
import torch

from roadie.engine.losses import Loss, Terms, TrainingRow, token_losses
from roadie.errors import ConfigError

TOKENS, TARGETS = [3, 4, 5, 6, 7], [4, 5, 6, 7, 8]
LP = [-0.5, -2.0, -1.0, -3.0, -0.1]
OLD = [-1.0, -1.5, -1.0, -0.2, -2.5]
ADVANTAGES = [1.0, -2.0, 0.5, 1.5, -1.0]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 1.0]
SETTINGS = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
}


def by_hand(loss: str, lp: list[float]) -> list[tuple[float, float]]:
    """For each token the loss and its derivative by lp."""
    told = SETTINGS.get(loss, {})
    low, high = told.get("clip_low_threshold", 0.0), told.get("clip_high_threshold", math.inf)
    mean = sum(one - old for one, old in zip(lp, OLD, strict=True)) / len(lp)
    found = []
    for one, old, advantage, weight in zip(lp, OLD, ADVANTAGES, WEIGHTS, strict=True):
        ratio = math.exp(mean if loss == "gspo" else one - old)
        clipped = min(max(ratio, low), high)
        if loss == "importance_sampling":
            value, slope = ratio * advantage, ratio * advantage
        elif loss in ("ppo", "gspo"):
            value = min(ratio * advantage, clipped * advantage)
            slope = ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
        elif loss == "cispo":
            value, slope = clipped * one * advantage, clipped * advantage
        else:
            value = one * advantage - 0.5 * told["beta"] * (one - old) ** 2
            slope = advantage - told["beta"] * (one - old)
        found.append((-weight * value, -weight * slope))
    return found


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_losses_that_learn_from_samples(loss):
    row = TrainingRow(TOKENS, TARGETS, WEIGHTS, ADVANTAGES, OLD)
    terms = Terms.of(row, Loss(loss), SETTINGS.get(loss))
    values = torch.cat([terms.values, terms.values]).double()  # two rows alike: a mean over both would be another
    lp = torch.tensor([*LP, *(one - 1 for one in LP)], dtype=torch.float64).unsqueeze(1).requires_grad_()
    rows = torch.tensor([0] * 5 + [1] * 5)
    found = token_losses(Loss(loss), lp, values, rows, 2)
    (gradient,) = torch.autograd.grad(found.sum(), lp)
    expected = [*by_hand(loss, LP), *by_hand(loss, [one - 1 for one in LP])]
    assert found.tolist() == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([slope for _, slope in expected], rel=1e-6)


def test_cross_entropy_and_given_gradients_are_weighted_sums_of_logprobs():
    lp = torch.tensor(LP).unsqueeze(1).requires_grad_()
    rows = torch.zeros(5, dtype=torch.int64)
    entropy = Terms.of(TrainingRow(TOKENS, TARGETS, WEIGHTS), Loss.CROSS_ENTROPY)
    given = Terms.of(TrainingRow(TOKENS, TARGETS, gradients=WEIGHTS), Loss.GIVEN)
    expected = -sum(weight * one for weight, one in zip(WEIGHTS, LP, strict=True))
    assert token_losses(Loss.CROSS_ENTROPY, lp, entropy.values, rows, 1).sum().item() == pytest.approx(expected)
    found = token_losses(Loss.GIVEN, lp, given.values, rows, 1).sum()
    assert found.item() == pytest.approx(-expected)
    assert torch.autograd.grad(found, lp)[0].flatten().tolist() == WEIGHTS


def test_several_targets_at_a_position():
    targets, weights = [[4, 9], [5, 9], [6, 9]], [[0.75, 0.25], [0.0, 0.0], [1.0, 0.0]]
    terms = Terms.of(TrainingRow([3, 4, 5], targets, weights), Loss.CROSS_ENTROPY)
    assert terms.positions.tolist() == [0, 2]
    assert terms.targets.tolist() == [[4, 9], [6, 9]]
    lp = torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]])
    losses = token_losses(Loss.CROSS_ENTROPY, lp, terms.values, torch.tensor([0, 0]), 1)
    assert losses.tolist() == [1.25, 3.0]
    spread = terms.spread(lp)
    assert spread.shape == (3, 2)
    assert spread[1].isnan().all()
    assert spread[2].tolist() == [-3.0, -math.inf]


@pytest.mark.parametrize(
    ("loss", "row", "positions"),
    [
        ("cross_entropy", {"weights": [0, 1, 0, 2, 0]}, [1, 3]),
        ("cross_entropy", {}, [0, 1, 2, 3, 4]),
        ("ppo", {"advantages": [0, 0, 1, 0, -1], "logprobs": OLD}, [2, 4]),
        ("ppo", {"advantages": ADVANTAGES, "logprobs": OLD, "weights": [0, 0, 0, 1, 1]}, [3, 4]),
        ("dro", {"advantages": [0.0] * 5, "logprobs": OLD, "weights": [0, 0, 0, 1, 1]}, [3, 4]),
        ("gspo", {"advantages": [0, 0, 1, 0, 0], "logprobs": OLD, "sequence_ratio_mask": [0, 1, 1, 0, 0]}, [1, 2]),
        ("given", {"gradients": [0, 0, 0, 0, 1]}, [4]),
    ],
)
def test_only_tokens_that_are_worth_something_have_a_term(loss, row, positions):
    made = TrainingRow(TOKENS, TARGETS, **row)
    assert Terms.of(made, Loss(loss)).positions.tolist() == positions
    assert Terms.of(made, Loss(loss), are_all=True).positions.tolist() == [0, 1, 2, 3, 4]


def test_the_ratio_of_a_sequence_is_over_its_mask_and_thresholds_may_differ_by_token():
    row = TrainingRow(
        TOKENS[:2],
        TARGETS[:2],
        advantages=[1.0, 0.0],
        logprobs=[-1.0, -1.0],
        sequence_ratio_mask=[1.0, 1.0],
        clip_low_threshold=[0.0, 0.0],
        clip_high_threshold=[9.0, 1.0],
    )
    terms = Terms.of(row, Loss.GSPO)
    lp = torch.tensor([[-0.5], [0.0]])
    losses = token_losses(Loss.GSPO, lp, terms.values, torch.tensor([0, 0]), 1)
    assert losses.tolist() == pytest.approx([-math.exp(0.75), 0.0])


def test_a_ratio_without_bounds_harms_no_token_without_weight():
    row = TrainingRow(TOKENS, TARGETS, advantages=[0, 0, 0, 0, 1], logprobs=[-999.0, 0, 0, 0, -1.0])
    terms = Terms.of(row, Loss.IMPORTANCE_SAMPLING, are_all=True)
    lp = torch.tensor(LP).unsqueeze(1).requires_grad_()
    losses = token_losses(terms.loss, lp, terms.values, torch.zeros(5, dtype=torch.int64), 1)
    (gradient,) = torch.autograd.grad(losses.sum(), lp)
    assert losses[:4].tolist() == [0.0] * 4
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("loss", "row", "settings", "message"),
    [
        ("ppo", {}, None, "got no advantages, logprobs for the loss ppo"),
        (
            "given",
            {"gradients": [1.0] * 5, "weights": [1.0] * 5},
            None,
            "got weights, which the loss given does not use",
        ),
        ("cross_entropy", {"advantages": [1.0] * 5}, None, "got advantages, which the loss cross_entropy"),
        ("cross_entropy", {"weights": [1.0] * 4}, None, r"got weights of shape \(4,\); wanted \(5,\)"),
        ("cross_entropy", {"weights": [1.0] * 4 + [math.nan]}, None, "got weights that are not finite"),
        ("cross_entropy", {"weights": ["x"] * 5}, None, "got weights that are no numbers"),
        ("cross_entropy", {"targets": [1, 2]}, None, r"got targets of shape \(2,\) for 5 tokens"),
        ("cross_entropy", {"targets": [1, 2, 3, 4, 99]}, None, "got target 99; wanted 0 to 49"),
        ("cross_entropy", {"targets": [1, 2, 3, 4, -100]}, None, "got target -100; wanted 0 to 49"),
        ("cross_entropy", {"tokens": [1.5] * 5}, None, "got tokens of torch.float32; wanted whole numbers"),
        ("cross_entropy", {"tokens": []}, None, "got tokens of"),
        ("cross_entropy", {"tokens": [[1], [2, 3]]}, None, "got tokens that are no numbers in rows of equal length"),
        (
            "ppo",
            {"targets": [[1], [2], [3], [4], [5]], "advantages": OLD, "logprobs": OLD},
            None,
            r"one for each(\n|$)",
        ),
        ("cross_entropy", {}, {"beta": 1.0}, "got 'beta' for the loss cross_entropy; wanted nothing"),
        ("dro", {"advantages": OLD, "logprobs": OLD}, {"beta": -1.0}, "got beta=-1.0; wanted a finite number"),
        (
            "ppo",
            {"advantages": OLD, "logprobs": OLD},
            {"clip_low_threshold": 2.0},
            "got clip_low_threshold=2.0 above clip_high_threshold=1.2",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(loss, row, settings, message):
    made = TrainingRow(**{"tokens": TOKENS, "targets": TARGETS, **row})
    with pytest.raises(ConfigError, match=message):
        Terms.of(made, Loss(loss), settings, vocabulary=50)


def test_an_unknown_loss_is_named():
    with pytest.raises(ConfigError, match="got loss 'stable_reinforce'; wanted one of cross_entropy"):
        Loss.parse("stable_reinforce")
