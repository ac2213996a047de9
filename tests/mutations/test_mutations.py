"""Each planted mistake makes a law fail.

mistake                                   caught by
sign of theta                             hand_computed.check_quarter_turn
neighbours paired instead of halves       hand_computed.check_pairs
composition in the other order            laws.check_composing_is_applying_twice
bias forgotten in a merge                 tuner_laws.check_merged_is_unmerged
arithmetic in half precision              laws.check_one_rounding
base rows rotated by the first adapter    tuner_laws.check_mixed_rows_are_rows_alone
unmerge without its patch                 tuner_laws.check_unmerging_restores
input merged with R instead of R^T        tuner_laws.check_merged_is_unmerged
bias turned by the input's rotation       tuner_laws.check_merged_is_unmerged
inputs of two adapters in the other order tuner_laws.check_active_adapters_apply_in_order
inputs of a mixed batch in other rows     tuner_laws.check_mixed_rows_are_rows_alone
inputs of no adapter turned               tuner_laws.check_mixed_rows_are_rows_alone
input missing from the file               tuner_laws.check_saving_and_loading_keeps_every_bit
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import hand_computed
from tests.laws import rotations as laws
from tests.laws import tuner as tuner_laws
from tests.laws.models import linear_chain
from torch import Tensor

import roadie
from roadie import rotation
from roadie.rotation import Rotation
from roadie.testing import randomise
from roadie.tuner import RoadInput, layer, merging, routing, weight


def model(dtype: torch.dtype = torch.float32) -> Any:
    adapted = roadie.get_peft_model(
        linear_chain(8, 16, dtype=dtype), roadie.RoadConfig(group_size=4, target_modules=["first"], variant="road_2")
    )
    adapted.add_adapter("other", roadie.RoadConfig(group_size=4, target_modules=["first"]))
    return randomise(adapted, scale=0.2)


def rotations() -> tuple[Rotation, Rotation]:
    vectors = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Rotation(vectors[0], vectors[1], 4), Rotation(vectors[2], vectors[3], 4)


def composing() -> None:
    # Through the module, so that the planted function is the one that is looked up.
    laws.check_composing_is_applying_twice(torch.randn(3, 16, dtype=torch.float64), *rotations())


def one_rounding() -> None:
    narrow = [Rotation(r.direct.float(), r.cross.float(), r.group_size) for r in rotations()]
    laws.check_one_rounding(torch.randn(64, 16).bfloat16(), *narrow)


def mixed_rows() -> None:
    x = torch.randn(3, 8)
    tuner_laws.check_mixed_rows_are_rows_alone(model(), x, ["default", "__base__", "other"])


def merged() -> None:
    tuner_laws.check_merged_is_unmerged(model(), ("default",))


def restored() -> None:
    tuner_laws.check_unmerging_restores(model(torch.bfloat16), ("default",), "half")


def with_inputs(dtype: torch.dtype = torch.float32) -> Any:
    """A square layer, whose two adapters rotate its input, and do not commute; a third does not."""
    settings: dict[str, Any] = {"group_size": 4, "target_modules": ["first"]}
    base = linear_chain(16, 16, dtype=dtype)
    adapted = roadie.get_peft_model(base, roadie.RoadConfig(variant="road_2", input_stages=[8], **settings))
    adapted.add_adapter("other", roadie.RoadConfig(variant="road_4", input_stages=[2, 8], **settings))
    adapted.add_adapter("plain", roadie.RoadConfig(**settings))
    return randomise(adapted, scale=0.2)


def inputs_merged() -> None:
    tuner_laws.check_merged_is_unmerged(with_inputs(), ("default", "other"))


def inputs_in_order() -> None:
    tuner_laws.check_active_adapters_apply_in_order(with_inputs(), ("default", "other"))


def inputs_by_row() -> None:
    x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for trained in (False, True):  # by the bank, and by tables of the batch
        model = with_inputs(torch.float64)
        model.base_model.set_requires_grad("default", trained)
        check = tuner_laws.check_mixed_rows_are_rows_alone
        check(model, x, ["default", "plain", "__base__", "other"])


def inputs_saved() -> None:
    def load(folder: Path) -> Any:
        return roadie.PeftModel.from_pretrained(linear_chain(16, 16), folder)

    adapted = with_inputs()
    for name in ("other", "plain"):
        adapted.delete_adapter(name)
    with tempfile.TemporaryDirectory() as folder:
        tuner_laws.check_saving_and_loading_keeps_every_bit(adapted, load, Path(folder))


def with_the_other_sign(
    first: Tensor, second: Tensor, direct1: Tensor, cross1: Tensor, direct2: Tensor, cross2: Tensor
) -> tuple[Tensor, Tensor]:
    return direct1 * first + cross1 * second, direct2 * second - cross2 * first


def neighbours(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, group_size // 2, 2))
    return groups[..., 0], groups[..., 1]


def swapped(outer: Rotation, inner: Rotation, _compose: Callable[..., Rotation] = rotation.compose) -> Rotation:
    return _compose(inner, outer)


def in_half_precision(x: Tensor, *turns: Rotation) -> Tensor:
    for turn in turns:
        direct, cross = turn.direct.to(x.dtype), turn.cross.to(x.dtype)
        x = direct * x + cross * rotation.swap(x, turn.group_size)
    return x


def first_adapter_for_the_base(table: tuple[str, ...], names: Any) -> Tensor:
    return torch.tensor([table.index(name) if name in table else 0 for name in names])


def without_the_patch(rows: Tensor, turns: Any, patch: Any) -> Tensor:
    return merging.rotated_rows(rows, turns)


def other_rows(self: Any, y: Tensor, *rest: Any, _routed: Callable[..., Tensor] = RoadInput._routed) -> Tensor:
    return _routed(self, y.flip(0), *rest).flip(0)


def first_adapter_for_rows_without(self: Any, y: Tensor, *_: Any) -> Tensor:
    return rotation.rotate(y, *self.rotations("default"))


def as_outputs(self: Any, names: Any) -> Any:
    return self.active_adapters if names is None else names


def of_bias(self: merging.WeightRotations) -> merging.WeightRotations:
    return merging.WeightRotations((*self.rows, *self.columns))


def without_inputs(_own: Any = roadie.RoadModel._get_adapter_state_dict, **arguments: Any) -> Any:
    found = _own(**arguments)
    return {key: torch.zeros_like(value) if "road_input" in key else value for key, value in found.items()}


MISTAKES = {
    "sign of theta": (rotation, "rotate_pairs", with_the_other_sign, hand_computed.check_quarter_turn),
    "pairing": (rotation, "_halves", neighbours, hand_computed.check_pairs),
    "order of composition": (laws, "compose", swapped, composing),
    "bias forgotten": (weight.DenseWeight, "_merge_bias", lambda self, turns, exact: None, merged),
    "rounding forgotten": (laws, "rotate", in_half_precision, one_rounding),
    "base rows": (routing, "_slots_in", first_adapter_for_the_base, mixed_rows),
    "patch forgotten": (merging, "_restored", without_the_patch, restored),
    "input not transposed": (layer, "transposed", lambda turn: turn, inputs_merged),
    "bias turned by the input": (merging.WeightRotations, "of_bias", property(of_bias), inputs_merged),
    "order of inputs": (
        RoadInput,
        "names_for",
        lambda self, names: self.active_adapters if names is None else names,
        inputs_in_order,
    ),
    "rows of inputs": (RoadInput, "_routed", other_rows, inputs_by_row),
    "inputs of rows without": (RoadInput, "_routed", first_adapter_for_rows_without, inputs_by_row),
    "inputs not saved": (roadie.RoadModel, "_get_adapter_state_dict", without_inputs, inputs_saved),
}


@pytest.mark.filterwarnings("ignore:this adapter has")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, mistake, check = MISTAKES[name]
    check()
    monkeypatch.setattr(place, attribute, mistake)
    with pytest.raises(AssertionError):
        check()
