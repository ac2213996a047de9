"""The laws of adapters that rotate the inputs of layers too: those of all adapters, with and without rotations in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import tuner as tuner_laws
from tests.laws.models import linear_chain
from torch import Tensor, nn

import roadie
from roadie.testing import randomise, tiny_llama

VARIANTS = ("road_1", "road_2", "road_4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ["default", "__base__", "third", "other", "default", "plain"]
ORDERS = [("default",), ("default", "twin"), ("twin", "plain", "third", "other", "default")]


def adapted(
    *, dtype: torch.dtype = torch.float32, variant: str = "road_2", conv1d: bool = False, bias: bool = True
) -> Any:
    """Linear layers 8 -> 16 -> 16 with adapters that rotate all inputs, one of them, in a row, or none."""
    base: nn.Module = linear_chain(8, 16, 16, dtype=dtype, conv1d=conv1d, bias=bias)
    both = {"target_modules": ["first", "second"]}
    settings = {
        "default": {"variant": variant, "group_size": 4, "input_stages": [8], **both},
        "other": {"variant": "road_4", "stages": [8, 2], "input_stages": [16, 2], "target_modules": ["second"]},
        "third": {"variant": "road_1", "stages": [16, 4], "input_stages_pattern": {"first": [2, 4, 8]}, **both},
        "plain": {"variant": "road_1", "group_size": 4, **both},
        "twin": {"variant": "road_2", "group_size": 4, "input_stages": [8], **both},
    }
    configs = {name: roadie.RoadConfig(**changes) for name, changes in settings.items()}
    model = roadie.get_peft_model(base, configs.pop("default"))
    for name, config in configs.items():
        model.add_adapter(name, config)
    return randomise(model, scale=0.2)


def x_for(dtype: torch.dtype, rows: int = len(ROWS)) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", ORDERS, ids="+".join)
def test_merged_is_unmerged(names: tuple[str, ...], variant: str, dtype: torch.dtype) -> None:
    tuner_laws.check_merged_is_unmerged(adapted(variant=variant, dtype=dtype), names)


@pytest.mark.parametrize("names", ORDERS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_conv1d_merged_is_unmerged(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    tuner_laws.check_merged_is_unmerged(adapted(conv1d=True, dtype=dtype), names)


def test_a_layer_without_a_bias_merged_is_unmerged() -> None:
    tuner_laws.check_merged_is_unmerged(adapted(bias=False), ("default", "other"))


@pytest.mark.parametrize("exact", ["half", "always", "never"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_unmerging_restores(conv1d: bool, dtype: torch.dtype, exact: str) -> None:
    tuner_laws.check_unmerging_restores(adapted(dtype=dtype, conv1d=conv1d), ("default", "third"), exact)


@pytest.mark.parametrize("names", ORDERS[1:], ids="+".join)
def test_active_adapters_lie_around_each_other(names: tuple[str, ...]) -> None:
    tuner_laws.check_active_adapters_apply_in_order(adapted(), names)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_rows_are_rows_alone(variant: str, dtype: torch.dtype) -> None:
    tuner_laws.check_mixed_rows_are_rows_alone(adapted(variant=variant, dtype=dtype), x_for(dtype), ROWS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_gradients_are_those_of_rows_alone(variant: str) -> None:
    model = adapted(variant=variant, dtype=torch.float64)
    tuner_laws.check_mixed_gradients_are_those_of_rows_alone(model, x_for(torch.float64), ROWS)


@pytest.mark.filterwarnings("ignore:this adapter has")
@pytest.mark.parametrize("settings", [{"group_size": 8}, {"stages": [2, 16]}], ids=["plain", "in a row"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_keeps_every_bit(variant: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = roadie.RoadConfig(
        variant=variant,
        input_stages=[32],
        input_stages_pattern={"up_proj": [2, 64], "down_proj": []},
        target_modules=["q_proj", "up_proj", "down_proj"],
        **settings,
    )
    model = randomise(roadie.get_peft_model(tiny_llama(num_hidden_layers=1), config))
    assert len(tuner_laws.sites_of(model)) == 5

    def load(folder: Path) -> Any:
        return roadie.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder)

    tuner_laws.check_saving_and_loading_keeps_every_bit(model, load, tmp_path)
