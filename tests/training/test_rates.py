"""The search for a learning rate finds one that is as good as a full search, and leaves the adapter as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import roadie
from roadie import embedded
from roadie.cli.find_lr import show
from roadie.errors import ConfigError
from roadie.training.encoding import Example, collate
from roadie.training.rates import FACTOR, RateSearch, Trial, difference, find_learning_rate, following, search
from roadie.training.recipe import Recipe

MARGIN_NATS = 0.02
RECIPE = Recipe(batch_size=4, learning_rate=3e-3, warmup_ratio=0.1, max_length=32)


@pytest.fixture(scope="module")
def examples():
    """Rows of a kind of text that the embedded model never saw: of files to learn from, and of held-out files."""
    split = embedded.corpus.split("asyncio")
    return tuple(_rows(documents, count) for documents, count in ((split.train, 256), (split.held_out, 32)))


def _rows(documents, count, length=32):
    tokenizer = embedded.load_tokenizer()
    text = "\n".join(document.text for document in documents)[: count * length * 8]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cuts = [tuple(tokens[start : start + length]) for start in range(0, len(tokens) - length, length)]
    return [Example(cut, cut) for cut in cuts[:: max(1, len(cuts) // count)][:count]]


def adapted(variant="road_1"):
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", variant=variant)
    return roadie.get_peft_model(embedded.load_model(), config)


@pytest.mark.slow
@pytest.mark.long
def test_the_rate_found_is_as_good_as_that_of_a_full_search(examples):
    """Trainings three times as long, at every rate of the grid, on other held-out text: within MARGIN_NATS of the best."""
    learnt, held_out = examples
    found = search(embedded.load_model(), learnt[:-32], learnt[-32:], RECIPE, steps=20)
    rates = [1e-3, 3e-3, 9.5e-3, 3e-2, 9.5e-2]
    losses = {rate: _trained(adapted(), learnt, held_out, rate, steps=60) for rate in rates}
    best, worst = min(losses.values()), max(losses.values())
    assert worst - best > 2 * MARGIN_NATS  # else any rate would do
    near = min(rates, key=lambda rate: abs(math.log(rate / found.learning_rate)))
    assert math.isclose(near, found.learning_rate, rel_tol=0.1)
    assert losses[near] <= best + MARGIN_NATS


def _trained(model, learnt, held_out, rate, steps):
    """A plain training loop, not the one under test."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 6, (steps - step) / (steps - 6))
        rows = [learnt[index] for index in torch.randint(len(learnt), (4,), generator=generator).tolist()]
        model(**collate(rows), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(**collate(held_out), use_cache=False).loss.item()


def test_the_search_starts_at_the_rate_of_the_models_width(examples):
    learnt, _ = examples
    found = search(embedded.load_model(), learnt[:32], learnt[32:40], replace(RECIPE, learning_rate=None), steps=2)
    assert 1.2e-2 in [trial.learning_rate for trial in found.trials]


def test_the_model_is_as_it_was(examples):
    learnt, _ = examples
    model = embedded.load_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    found = search(model, learnt[:32], learnt[32:40], replace(RECIPE, variant="road_2"), steps=2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len({trial.loss for trial in found.trials}) > 1


def test_a_trial_is_a_plain_training_loop(examples):
    """Against PyTorch's own gradients and AdamW.

    Sums are in another order. An element of which the gradient is rounding alone may take its step the other way, twice the
    rate, at a slope of that rounding; where it is less than all, the step is wrong by as much less as the slope is more.
    """
    learnt, _ = examples
    learnt, held_out, steps = learnt[:4], learnt[32:40], 3
    trial = next(
        t
        for t in search(embedded.load_model(), learnt, held_out, RECIPE, steps=steps).trials
        if t.learning_rate == 3e-3
    )
    model, exact = adapted(), adapted().double()
    exact(**collate(learnt), use_cache=False).loss.backward()
    parameters, wide = ([p for p in each.parameters() if p.requires_grad] for each in (model, exact))
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    # Of steps + 1, whose first has a rate of 0.
    rates = [3e-3 * (steps + 1 - step) / steps for step in range(1, steps + 1)]
    apart = 0.0
    for rate in rates:  # all four rows are in each batch
        optimizer.param_groups[0]["lr"] = rate
        model(**collate(learnt), use_cache=False).loss.backward()
        if not apart:
            rounding = max(float((p.grad - q.grad).abs().max()) for p, q in zip(parameters, wide, strict=True))
            apart = 2 * sum(rates) * rounding * sum(p.numel() for p in parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wanted = model(**collate(held_out), use_cache=False).loss.item()
    assert trial.loss == pytest.approx(wanted, rel=0, abs=apart)


def test_a_trial_sees_the_same_whatever_was_tried_before(examples):
    learnt, _ = examples
    one = search(embedded.load_model(), learnt[:32], learnt[32:40], replace(RECIPE, learning_rate=1e-2), steps=3)
    other = search(embedded.load_model(), learnt[:32], learnt[32:40], replace(RECIPE, learning_rate=3.2e-2), steps=3)
    shared = {trial.learning_rate: trial.loss for trial in one.trials}
    both = [(shared[t.learning_rate], t.loss) for t in other.trials if t.learning_rate in shared]
    assert both
    assert all(first == second for first, second in both)


def test_micro_batches_change_nothing_but_rounding(examples):
    learnt, _ = examples
    whole = search(embedded.load_model(), learnt[:32], learnt[32:40], RECIPE, steps=2)
    parts = search(embedded.load_model(), learnt[:32], learnt[32:40], replace(RECIPE, micro_batch_size=1), steps=2)
    for one, other in zip(whole.trials, parts.trials, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_the_search_goes_on_until_the_best_rate_has_worse_neighbours():
    def walk(best):
        losses = {}
        rate = 3e-3
        while rate is not None:
            losses[rate] = abs(math.log(rate / best))
            rate = following(losses)
        return losses

    for best in (1e-5, 3e-3, 0.1):
        losses = walk(best)
        chosen = min(losses, key=losses.get)
        assert abs(math.log(chosen / best)) <= math.log(FACTOR) / 2 + 0.01
        assert min(losses) < chosen < max(losses)
    assert max(walk(1e9)) < 1  # the grid ends there


def test_a_rate_at_which_all_diverges_is_left_downwards():
    assert following({0.3: math.inf}) < 0.3 or following({0.3: math.inf, 0.95: math.inf}) < 0.3


def test_from_files_by_the_command_line(texts, tiny_path):
    recipe = Recipe(batch_size=4, group_size=16, learning_rate=1e-2)
    found = find_learning_rate(texts, model=str(tiny_path), recipe=recipe, steps=4)
    assert found.improves
    said = show(found)
    assert f"--learning-rate {found.learning_rate:g}" in said
    with pytest.raises(ConfigError, match="steps=1"):
        find_learning_rate(texts, model=str(tiny_path), steps=1)


def test_a_search_that_gained_nothing_says_so():
    said = show(RateSearch((Trial(1e-3, 2.0), Trial(1e-2, 2.5)), 1.9, 8))
    assert "no rate made it smaller" in said
    assert "--learning-rate" not in said


def parts(*nats, tokens=10):
    """Losses of batches of so many tokens each."""
    return tuple((value * tokens, tokens) for value in nats)


def searched(*trials, before=(3.0, 4.0, 3.5)):
    made = [Trial(rate, sum(losses) / len(losses), parts(*losses)) for rate, losses in trials]
    return RateSearch(tuple(made), sum(before) / len(before), 8, parts(*before))


def test_the_error_of_a_difference_is_that_of_a_ratio_of_sums():
    # gaps of 2 and 0 nats in 2 tokens each: a mean of 0.5 a token, residuals of 1 and -1, sqrt(2 / 1 * 2) / 4
    assert difference(((10.0, 2), (6.0, 2)), ((8.0, 2), (6.0, 2))) == (0.5, 0.5)
    # proportional to the tokens, whatever the batches are like
    assert difference(((10.0, 4), (6.0, 2)), ((8.0, 4), (5.0, 2))) == (0.5, 0.0)
    assert difference(((10.0, 4),), ((8.0, 4),))[1] == float("inf")


def test_a_search_is_trusted_where_the_best_rate_is_better_for_certain():
    sure = searched((1e-3, (2.5, 3.5, 3.0)), (1e-2, (2.0, 3.0, 2.5)), (1e-1, (2.4, 3.4, 2.9)))
    assert sure.doubts == ()
    diverged = Trial(1e-1, float("inf"), ((float("inf"), 1),))
    assert RateSearch((*sure.trials[:2], diverged), sure.loss_before, 8, sure.parts_before).doubts == ()
    assert "too short" not in show(sure)


@pytest.mark.parametrize(
    ("trials", "doubt"),
    [
        (((1e-3, (2.6, 3.0, 2.2)), (1e-2, (2.0, 3.1, 2.5)), (1e-1, (2.4, 3.4, 2.9))), "0.001 is worse than 0.01 by"),
        (((1e-3, (2.5, 3.5, 3.0)), (1e-2, (2.0, 3.0, 2.5)), (1e-1, (2.6, 3.0, 2.2))), "0.1 is worse than 0.01 by"),
        (((1e-3, (2.5, 3.5, 3.0)), (1e-2, (2.0, 3.0, 2.5))), "0.01 is the highest rate that was tried"),
        (((1e-2, (2.0, 3.0, 2.5)), (1e-1, (2.4, 3.4, 2.9))), "0.01 is the lowest rate that was tried"),
        (((1e-3, (3.5, 4.5, 4.0)), (1e-2, (3.1, 3.8, 3.5)), (1e-1, (3.5, 4.2, 3.9))), "the loss moved by 0.0333 alone"),
    ],
)
def test_a_search_that_chance_may_have_decided_is_not_trusted(trials, doubt):
    found = searched(*trials)
    assert len(found.doubts) == 1
    assert found.doubts[0].startswith(doubt)
    said = show(found)
    assert "use --learning-rate 0.01, but this search was too short to trust" in said
    assert "--steps 32" in said
