"""Whoever trains a RoAd model at a rate that is for weights is told once, and nobody else is."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roadie
from roadie.errors import LearningRateWarning
from roadie.learning_rate import default_learning_rate
from roadie.testing import tiny_llama
from roadie.tuner.angle_watch import FIRST_VERDICT, GROWS, SLOWEST, AngleWatch

RECIPE = default_learning_rate(64)


def _model(**settings: Any) -> Any:
    config = {"target_modules": ["q_proj", "down_proj"], "group_size": 8, **settings}
    return roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**config)).train()


def _batch(number: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 128, (2, 6), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def _train(
    model: Any,
    rate: Callable[[int], float],
    updates: int = 45,
    between: Callable[[int], Any] = lambda update: None,
    optimiser: Any = torch.optim.AdamW,
    micro_batches: int = 1,
) -> list[tuple[int, str]]:
    """Train by hand; gives what was said, and after how many updates."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = optimiser(parameters, lr=1.0)
    said = []
    for update in range(updates):
        between(update)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for micro in range(micro_batches):
                model(**_batch(update * micro_batches + micro)).loss.backward()
        said += [(update, str(one.message)) for one in caught if one.category is LearningRateWarning]
        steps.param_groups[0]["lr"] = rate(update + 1)
        steps.step()
        steps.zero_grad()
    return said


def _hooks(model: nn.Module) -> int:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return sum(isinstance(hook, AngleWatch) for hook in hooks)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-6, 2e-5, 5e-5])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_rate_for_weights_is_told_once_with_the_rate_of_the_recipe(rate: float, variant: str) -> None:
    model = _model(variant=variant)
    said = _train(model, lambda _: rate)
    assert [update for update, _ in said] == [FIRST_VERDICT]
    assert f"learning_rate={RECIPE:g}" in said[0][1]
    assert "LearningRateWarning" in said[0][1]
    assert _hooks(model) == 0


@pytest.mark.parametrize("rate", [1e-3, RECIPE, 0.1])
def test_a_rate_that_turns_angles_is_not_told_and_no_longer_watched(rate: float) -> None:
    model = _model()
    assert _train(model, lambda _: rate) == []
    assert _hooks(model) == 0


@pytest.mark.parametrize("warm_up", [100, 1000])
def test_a_warm_up_to_a_good_rate_is_not_told(warm_up: int) -> None:
    model = _model()
    assert _train(model, lambda update: RECIPE * update / warm_up, updates=45) == []


def test_a_warm_up_to_a_rate_for_weights_is_told_when_it_ends() -> None:
    said = _train(_model(), lambda update: 5e-5 * min(1.0, update / 30), updates=85)
    assert [update for update, _ in said] in ([40], [80])


def test_a_short_run_that_ends_at_a_low_rate_is_not_told() -> None:
    assert _train(_model(), lambda update: RECIPE * (1 - update / 22), updates=22) == []


def test_updates_are_counted_and_not_forwards() -> None:
    said = _train(_model(), lambda _: 2e-5, micro_batches=3)
    assert [update for update, _ in said] == [FIRST_VERDICT]


@pytest.mark.parametrize("evaluating", [False, True])
def test_small_steps_of_rl_are_not_told(evaluating: bool) -> None:
    """A policy writes, without gradient, what its next update learns from."""
    model = _model()

    def write(_: int) -> None:
        model.train(not evaluating)
        model.generate(input_ids=_batch(0)["input_ids"], max_new_tokens=1, pad_token_id=0)
        model.train()

    assert _train(model, lambda _: 1e-6, between=write) == []
    assert _hooks(model) == 0


def test_a_reference_without_the_adapter_is_not_told() -> None:
    model = _model()

    def ask(update: int) -> None:
        with torch.no_grad(), model.disable_adapter():
            model(**_batch(update))

    assert _train(model, lambda _: 1e-6, between=ask) == []


def test_evaluation_now_and_then_hides_nothing() -> None:
    model = _model()

    def evaluate(update: int) -> None:
        if update % 5 == 0:
            model.eval()
            with torch.no_grad():
                model(**_batch(update))
            model.train()

    assert len(_train(model, lambda _: 2e-5, between=evaluate)) == 1


def test_it_can_be_silenced(recwarn: Any) -> None:
    warnings.filterwarnings("ignore", category=LearningRateWarning)
    model, steps = _model(), None
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    for update in range(25):
        model(**_batch(update)).loss.backward()
        steps.step()
    assert [one for one in recwarn if one.category is LearningRateWarning] == []


def _fused(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)  # writes to parameters without counting a version


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor, _fused])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_any_optimiser(optimiser: Any, micro_batches: int) -> None:
    said = _train(_model(), lambda _: 1e-5, optimiser=optimiser, micro_batches=micro_batches)
    assert [update for update, _ in said] == [FIRST_VERDICT]


def test_a_copy_and_a_loaded_adapter_are_watched_too(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    assert len(_train(copied, lambda _: 2e-5, updates=22)) == 1
    assert len(_train(model, lambda _: 2e-5, updates=22)) == 1
    from peft import PeftModel

    with_peft = roadie.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    assert isinstance(with_peft, PeftModel)
    assert len(_train(with_peft, lambda _: 2e-5, updates=22)) == 1
    assert _hooks(roadie.PeftModel.from_pretrained(tiny_llama(), tmp_path)) == 0


def test_a_model_without_its_adapters_is_what_it_was() -> None:
    model = _model()
    assert _hooks(model) > 0
    assert _hooks(model.merge_and_unload()) == 0


def test_adapters_that_are_not_trained_cost_next_to_nothing() -> None:
    """Modules are looked through at the first forwards with gradient, and ever more seldom."""
    model = _model()
    model.requires_grad_(False)
    looked: list[int] = []
    inner = model.get_base_model()
    listed = inner.model.modules
    inner.model.modules = lambda: looked.append(1) or listed()
    for _ in range(64):
        model(**_batch(0))
    assert len(looked) <= 1 + math.log2(64)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [2e-5, RECIPE])
def test_transformers_trainer(rate: float, tmp_path: Path) -> None:
    import transformers

    model = _model(task_type="CAUSAL_LM")
    rows = [{name: tensor[0] for name, tensor in _batch(number).items()} for number in range(60)]
    settings = {"learning_rate": rate, "per_device_train_batch_size": 2, "max_steps": 25, "report_to": []}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert sum(one.category is LearningRateWarning for one in caught) == (rate == 2e-5)


def test_roadie_train_tells_by_the_loss_alone(tmp_path: Path) -> None:
    """Its own watch knows the schedule; two would say the same."""
    from roadie.training.models import as_source
    from roadie.training.recipe import Recipe
    from roadie.training.run import adapted_model

    assert _hooks(adapted_model(as_source(None), Recipe(learning_rate=2e-5))) == 0


def test_the_bounds_follow_from_adamw_on_noise() -> None:
    """What the docstrings of the bounds say, of a thousand parameters whose gradients are noise."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(10_000))
    steps, change = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0), {}
    for update in range(1, 161):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(10_000)
        steps.step()
        change[update] = float((parameter.detach() - before).abs().median())
    # Of a median of 10,000 the standard error is 1.25 / 100 of a deviation: a few percent are more than five of them.
    assert 1e-3 * min(change.values()) > 1.4 * SLOWEST
    assert 5e-5 * change[1] < SLOWEST
    assert change[20] / change[10] < 1 < GROWS < 2 * change[20] / change[10]
