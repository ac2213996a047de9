"""Each planted mistake makes a law fail.

mistake                                   caught by
sign of theta                             hand_computed.check_quarter_turn
neighbours paired instead of halves       hand_computed.check_pairs
composition in the other order            laws.check_composing_is_applying_twice
bias forgotten in a merge                 tuner_laws.check_merged_is_unmerged
arithmetic in half precision              laws.check_one_rounding
base rows rotated by the first adapter    tuner_laws.check_mixed_rows_are_rows_alone
unmerge without its patch                 tuner_laws.check_unmerging_restores
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import roadie
from roadie import rotation
from roadie.rotation import Rotation
from roadie.testing import hand_computed, laws, randomise, tuner_laws
from roadie.testing.models import linear_chain
from roadie.tuner import merging, routing, weight


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


MISTAKES = {
    "sign of theta": (rotation, "rotate_pairs", with_the_other_sign, hand_computed.check_quarter_turn),
    "pairing": (rotation, "_halves", neighbours, hand_computed.check_pairs),
    "order of composition": (laws, "compose", swapped, composing),
    "bias forgotten": (weight.DenseWeight, "_merge_bias", lambda self, turns, exact: None, merged),
    "rounding forgotten": (laws, "rotate", in_half_precision, one_rounding),
    "base rows": (routing, "_slots_in", first_adapter_for_the_base, mixed_rows),
    "patch forgotten": (merging, "_restored", without_the_patch, restored),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, mistake, check = MISTAKES[name]
    check()
    monkeypatch.setattr(place, attribute, mistake)
    with pytest.raises(AssertionError):
        check()
