"""The laws of adapted models: merged is unmerged, unmerging restores, mixed rows are rows alone, saved is loaded."""

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
NAMES = ("default", "other", "third")


def adapted(
    base: nn.Module | None = None, *, dtype: torch.dtype = torch.float32, variant: str = "road_2", group_size: int = 4
) -> Any:
    """Two linear layers of 16 with three adapters: other variants, other group sizes, fewer targets."""
    model = roadie.get_peft_model(
        linear_chain(8, 16, 16, dtype=dtype) if base is None else base,
        roadie.RoadConfig(variant=variant, group_size=group_size, target_modules=["first", "second"]),
    )
    model.add_adapter("other", roadie.RoadConfig(variant="road_4", group_size=8, target_modules=["second"]))
    model.add_adapter("third", roadie.RoadConfig(variant="road_1", group_size=4, target_modules=["first", "second"]))
    return randomise(model, scale=0.2)


def x_for(dtype: torch.dtype, rows: int = 5) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", [("default",), ("default", "third"), ("third", "other", "default")], ids="+".join)
def test_merged_is_unmerged(names: tuple[str, ...], variant: str, dtype: torch.dtype) -> None:
    tuner_laws.check_merged_is_unmerged(adapted(variant=variant, dtype=dtype), names)


def test_a_conv1d_merged_is_unmerged() -> None:
    tuner_laws.check_merged_is_unmerged(adapted(linear_chain(8, 16, 16, conv1d=True)), ("default",))


@pytest.mark.parametrize("exact", ["half", "always", "never"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_unmerging_restores(variant: str, dtype: torch.dtype, exact: str) -> None:
    tuner_laws.check_unmerging_restores(adapted(variant=variant, dtype=dtype), ("default", "third"), exact)


@pytest.mark.parametrize("names", [("default", "third"), ("third", "other", "default")], ids="+".join)
def test_active_adapters_apply_in_order(names: tuple[str, ...]) -> None:
    tuner_laws.check_active_adapters_apply_in_order(adapted(), names)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_rows_are_rows_alone(variant: str, dtype: torch.dtype) -> None:
    rows = ["default", "__base__", "third", "other", "default"]
    tuner_laws.check_mixed_rows_are_rows_alone(adapted(variant=variant, dtype=dtype), x_for(dtype), rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_gradients_are_those_of_rows_alone(variant: str) -> None:
    rows = ["default", "__base__", "third", "other", "default"]
    model = adapted(variant=variant, dtype=torch.float64)
    tuner_laws.check_mixed_gradients_are_those_of_rows_alone(model, x_for(torch.float64), rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 4, 16, 64])
def test_saving_and_loading_keeps_every_bit(variant: str, group_size: int, tmp_path: Path) -> None:
    config = roadie.RoadConfig(variant=variant, group_size=group_size, target_modules=["q_proj", "up_proj"])
    model = randomise(roadie.get_peft_model(tiny_llama(num_hidden_layers=1), config))

    def load(folder: Path) -> Any:
        return roadie.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), folder)

    tuner_laws.check_saving_and_loading_keeps_every_bit(model, load, tmp_path)
