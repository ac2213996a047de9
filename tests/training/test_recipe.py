"""The recipe: the paper's defaults, and a refusal with got / wanted / do for everything else."""

from __future__ import annotations

import json
import math

import pytest

from roadie.errors import ConfigError
from roadie.rotation import Variant
from roadie.training.recipe import VARIANTS, Recipe, default_learning_rate


def test_the_defaults_are_those_of_the_paper():
    recipe = Recipe()
    assert (recipe.target_modules, recipe.variant, recipe.group_size) == ("all-linear", "road_1", 64)
    assert (recipe.for_width(4096).learning_rate, recipe.weight_decay, recipe.schedule) == (3e-3, 0, "linear")
    assert (recipe.warmup_ratio, recipe.batch_size, recipe.max_length) == (0.1, 32, 512)
    assert not recipe.adapt_group_size


@pytest.mark.parametrize(
    ("width", "rate"),
    [
        (None, 3e-3),
        (16, 1.2e-2),
        (256, 1.2e-2),
        (384, 9.8e-3),
        (1024, 6e-3),
        (4096, 3e-3),
        (5120, 2.7e-3),
        (10**6, 1e-3),
    ],
)
def test_the_rate_follows_the_width_between_what_was_measured(width, rate):
    assert default_learning_rate(width) == rate
    assert Recipe().for_width(width).peak_rate == rate


@pytest.mark.parametrize(
    ("rows", "passes", "batch_size", "rate"),
    [
        (306, 1.0, 4, 8e-3),  # nothing is seen twice
        (306, 800 / 306, 16, 5.1e-3),  # sqrt(20 / 50), which is more than sqrt(0.306)
        (306, 6.0, 16, 4.4e-3),  # sqrt(0.306), which is more than sqrt(20 / 115)
        (40, 3.2, 8, 8e-3),  # 16 steps: too few to learn by heart
        (10, 1000.0, 1, 1e-3),  # the lowest
        (1000, 6.0, 16, 8e-3),
        (170_000, 6.0, 16, 8e-3),
        (None, 6.0, 16, 8e-3),
    ],
)
def test_few_rows_that_are_seen_often_get_a_lower_rate(rows, passes, batch_size, rate):
    assert default_learning_rate(576, rows, passes, batch_size) == rate
    assert Recipe(epochs=passes, batch_size=batch_size).for_width(576, rows).peak_rate == rate


def test_steps_that_were_asked_for_count_as_passes():
    assert Recipe(max_steps=50, batch_size=16).for_width(576, 306).peak_rate == 5.1e-3
    assert Recipe(max_steps=5, batch_size=16).for_width(576, 306).peak_rate == 8e-3


def test_a_rate_that_was_asked_for_stays():
    assert Recipe(learning_rate=0.02).for_width(4096, rows=10) == Recipe(learning_rate=0.02)


def test_a_rate_that_is_left_to_the_model_is_none_without_one():
    assert Recipe().learning_rate is None
    with pytest.raises(ConfigError, match=r"got learning_rate=None.*; wanted a rate; use Recipe.for_width"):
        _ = Recipe().peak_rate


def test_the_variants_are_those_of_the_rotation():
    assert tuple(variant.value for variant in Variant) == VARIANTS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", "road_3"),
        ("group_size", 7),
        ("group_size", 0),
        ("group_size", 64.0),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("learning_rate", "3e-3"),
        ("weight_decay", -0.1),
        ("schedule", "cyclic"),
        ("warmup_ratio", 1.0),
        ("epochs", 0),
        ("epochs", math.inf),
        ("max_steps", 0),
        ("batch_size", True),
        ("batch_size", -1),
        ("micro_batch_size", 5),
        ("max_length", 1),
        ("precision", "fp16"),
        ("eval_share", 1),
        ("checkpoint_steps", 0),
        ("seed", -1),
        ("max_grad_norm", -1),
        ("target_modules", ()),
        ("target_modules", ""),
        ("target_modules", ["q_proj", 3]),
        ("share", "3/2"),
        ("share", 0.5),
        ("share", ""),
        ("method", "kto"),
        ("patience", 0),
        ("packing", "yes"),
        ("load_in_4bit", 1),
    ],
)
def test_what_is_not_valid_is_refused_with_its_name(name, value):
    with pytest.raises(ConfigError, match=rf"got {'batch_size' if name == 'micro_batch_size' else name}.*; .*wanted"):
        Recipe(**{name: value})


@pytest.mark.parametrize("beta", [0, -1, math.inf, math.nan, "0.1"])
def test_beta_is_of_dpo_and_above_0(beta):
    with pytest.raises(ConfigError, match=f"got beta={beta!r}; wanted a number above 0"):
        Recipe(method="dpo", beta=beta)


def test_a_setting_that_the_method_makes_void_is_refused():
    with pytest.raises(ConfigError, match=r"got beta=0\.1; wanted none with method='sft'"):
        Recipe(beta=0.1)
    with pytest.raises(ConfigError, match="got packing=True; wanted none with method='dpo'"):
        Recipe(method="dpo", packing=True)
    assert (Recipe().beta, Recipe(method="dpo").beta) == (None, 0.1)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="unknown setting learning_rat;"):
        Recipe.from_mapping({"learning_rat": 1e-3})


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(target_modules=["q_proj", "v_proj"], max_steps=3, variant="road_4"), Recipe(method="dpo")],
)
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping()))) == recipe


@pytest.mark.parametrize(
    ("micro", "devices", "per_device", "accumulation"), [(None, 1, 32, 1), (None, 4, 8, 1), (4, 1, 4, 8), (4, 2, 4, 4)]
)
def test_a_batch_is_spread_over_passes_and_devices(micro, devices, per_device, accumulation):
    recipe = Recipe(micro_batch_size=micro)
    assert recipe.per_device_batch_size(devices) == per_device
    assert recipe.accumulation_steps(devices) == accumulation
    assert per_device * accumulation * devices == recipe.batch_size


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"got batch_size=32 for 5 device\(s\).*wanted a multiple of 30"):
        Recipe().accumulation_steps(5)
