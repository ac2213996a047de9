"""The laws of rotations in a row: those of single rotations, for chains, and that a chain of one is a plain adapter."""

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


def adapted(
    *,
    dtype: torch.dtype = torch.float32,
    variant: str = "road_2",
    stages: tuple[int, ...] = (2, 4, 16),
    conv1d: bool = False,
) -> Any:
    """Two linear layers of 16 with five adapters: rotations in a row that differ in number and order, and a plain one."""
    base: nn.Module = linear_chain(8, 16, 16, dtype=dtype, conv1d=conv1d)
    both = ["first", "second"]
    model = roadie.get_peft_model(base, roadie.RoadConfig(variant=variant, stages=list(stages), target_modules=both))
    model.add_adapter("other", roadie.RoadConfig(variant="road_4", stages=[8, 2], target_modules=["second"]))
    model.add_adapter("third", roadie.RoadConfig(variant="road_1", stages=[16, 4], target_modules=both))
    model.add_adapter("plain", roadie.RoadConfig(variant="road_1", group_size=4, target_modules=both))
    model.add_adapter("twin", roadie.RoadConfig(variant="road_2", stages=list(stages), target_modules=both))
    return randomise(model, scale=0.2)


def x_for(dtype: torch.dtype, rows: int = len(ROWS)) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", [("default",), ("plain", "default"), ("third", "other", "default")], ids="+".join)
def test_merged_is_unmerged(names: tuple[str, ...], variant: str, dtype: torch.dtype) -> None:
    tuner_laws.check_merged_is_unmerged(adapted(variant=variant, dtype=dtype), names)


def test_a_conv1d_merged_is_unmerged() -> None:
    tuner_laws.check_merged_is_unmerged(adapted(conv1d=True), ("default",))


@pytest.mark.parametrize("exact", ["half", "always", "never"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_restores(dtype: torch.dtype, exact: str) -> None:
    tuner_laws.check_unmerging_restores(adapted(dtype=dtype), ("default", "third"), exact)


@pytest.mark.parametrize("names", [("default", "twin"), ("twin", "plain", "third", "other", "default")], ids="+".join)
def test_active_adapters_apply_in_order(names: tuple[str, ...]) -> None:
    tuner_laws.check_active_adapters_apply_in_order(adapted(), names)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_rows_are_rows_alone(variant: str, dtype: torch.dtype) -> None:
    tuner_laws.check_mixed_rows_are_rows_alone(adapted(variant=variant, dtype=dtype), x_for(dtype), ROWS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_gradients_are_those_of_rows_alone(variant: str) -> None:
    model = adapted(variant=variant, dtype=torch.float64)
    tuner_laws.check_mixed_gradients_are_those_of_rows_alone(model, x_for(torch.float64), ROWS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_keeps_every_bit(variant: str, tmp_path: Path) -> None:
    config = roadie.RoadConfig(
        variant=variant,
        stages=[2, 16, 64],
        stages_pattern={"k_proj": [2, 16], "v_proj": [8]},
        target_modules=["q_proj", "k_proj", "v_proj", "up_proj"],
    )
    model = randomise(roadie.get_peft_model(tiny_llama(num_hidden_layers=1), config))

    def load(folder: Path) -> Any:
        return roadie.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder)

    with pytest.warns(UserWarning, match="several rotations in a row"):
        tuner_laws.check_saving_and_loading_keeps_every_bit(model, load, tmp_path)
