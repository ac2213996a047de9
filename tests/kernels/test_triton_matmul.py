"""The matrix product that rotates its result: against the product and R in float64, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels import cases
from tests.laws.bounds import assert_within
from tests.versions import needs_loops_in_the_interpreter

from roadie.errors import KernelError
from roadie.kernels.contract import RowRotations
from roadie.kernels.eager import EagerImplementation
from roadie.kernels.triton import matmul, pairs
from roadie.kernels.triton.matmul import ProductTile, linear_rotate
from roadie.testing.accuracy import assert_as_accurate_as, assert_same_bits, unit_roundoff

SMALL = ProductTile(rows=16, pairs=16, depth=16, warps=1, stages=1)  # as small as tl.dot takes


def layer(
    rows: int,
    in_features: int,
    width: int,
    group_size: int = 2,
    *,
    bias: bool = True,
    slots: Sequence[int] | None = None,
    repeat: int = 1,
    num_slots: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None, RowRotations]:
    """x, weight, bias and rotations, all random; x and the weight are columns of wider matrices."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(rows, in_features + 3).to(dtype)[:, :in_features]
    weight = random(width, in_features + 1).to(dtype)[:, :in_features]
    routed = None if slots is None else torch.tensor(slots, dtype=torch.int64)
    turns = RowRotations(random(num_slots, width), random(num_slots, width), routed, repeat, None, group_size)
    return x, weight, random(width).to(dtype) if bias else None, turns


def truth_of(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> Tensor:
    h = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    b = cases.Batch(h, h, h, turns)
    return cases.by_rows(h, cases.dense_of_slots(turns), cases.slot_of_rows(b))


def reach_of(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> Tensor:
    """|R| (|W| |x| + |b|), which rounding errors are relative to."""
    h = torch.nn.functional.linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    b = cases.Batch(h, h, h, turns)
    return cases.by_rows(h, cases.dense_of_slots(turns).abs(), cases.slot_of_rows(b))


def check(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> None:
    """Off by at most (K + 4) u |R| (|W| |x| + |b|) for the sums, and by 2 u |z| for one rounding or truncation to x's dtype."""
    z, truth = linear_rotate(x, weight, bias, turns), truth_of(x, weight, bias, turns)
    assert z.dtype == x.dtype
    inside = (x.shape[1] + 4) * unit_roundoff(torch.float32) * reach_of(x, weight, bias, turns)
    last = 2 * unit_roundoff(x.dtype) * truth.abs() + torch.finfo(x.dtype).smallest_normal
    assert_within(z, truth, inside + last, "z")


LAYERS = {
    "one rotation": {"rows": 5, "in_features": 20, "width": 24, "group_size": 8},
    "neighbours": {"rows": 1, "in_features": 16, "width": 12, "group_size": 2, "bias": False},
    "one group over several tiles": {"rows": 2, "in_features": 7, "width": 80, "group_size": 80},
    "groups that straddle tiles": {"rows": 2, "in_features": 33, "width": 72, "group_size": 12},
    "rows": {"rows": 20, "in_features": 16, "width": 48, "group_size": 6, "slots": [2, -1, 0, 1] * 5, "num_slots": 3},
    "repeat": {
        "rows": 34,
        "in_features": 5,
        "width": 8,
        "group_size": 8,
        "slots": (1, -1),
        "repeat": 17,
        "num_slots": 2,
    },
    "one slot of two": {"rows": 2, "in_features": 4, "width": 4, "num_slots": 2},
    "no rows": {"rows": 0, "in_features": 4, "width": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@needs_loops_in_the_interpreter
def test_it_is_the_product_rotated(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*layer(**LAYERS[name], dtype=dtype))
    monkeypatch.setattr(matmul, "product_tile", lambda *_: SMALL)
    monkeypatch.setattr(matmul, "BAND", 2)
    check(*layer(**LAYERS[name], dtype=dtype))


@settings(max_examples=10)
@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from((2, 4, 6, 10, 16)), st.integers(1, 4), st.booleans())
@needs_loops_in_the_interpreter
@pytest.mark.slow
def test_any_shape(rows: int, in_features: int, group_size: int, groups: int, mixed: bool) -> None:
    slots = [(row * 5) % 4 - 1 for row in range(rows)] if mixed else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(matmul, "product_tile", lambda *_: SMALL)
        check(*layer(rows, in_features, group_size * groups, group_size, slots=slots, num_slots=3))


@needs_loops_in_the_interpreter
def test_it_is_as_accurate_as_the_layer_and_then_the_reference() -> None:
    """The rival rounds nothing in between in float32; ours sums the products in another order."""
    x, weight, bias, turns = layer(40, 256, 96, 32)
    rival = torch.empty(40, 96)
    EagerImplementation().rotate(torch.nn.functional.linear(x, weight, bias), rival, turns)
    value, truth = linear_rotate(x, weight, bias, turns), truth_of(x, weight, bias, turns)
    assert_as_accurate_as(value, rival, truth)


def test_all_tiles_give_what_they_should_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 16, 17, 256, 257, 4096):
            tile = matmul.product_tile(rows, dtype)
            assert min(tile.rows, tile.pairs, tile.depth) >= 16, "tl.dot takes no less"
            operands = (tile.rows + 2 * tile.pairs) * tile.depth * dtype.itemsize
            assert tile.stages * operands <= 99 * 1024, "the shared memory of compute capability 8.6"


@needs_loops_in_the_interpreter
def test_it_gives_the_same_bits_in_every_run() -> None:
    arguments = layer(20, 40, 24, 8)
    assert_same_bits(linear_rotate(*arguments), linear_rotate(*arguments), "again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x, w, b, t: (x, w, b, t._replace(sizes=torch.tensor([4], dtype=torch.int32))),
            "group size for each slot",
        ),
        (lambda x, w, b, t: (x, w, b, t._replace(group_size=6)), "group_size=6"),
        (lambda x, w, b, t: (x.double(), w.double(), None, t), "float64"),
        (lambda x, w, b, t: (x.half(), w, b, t), "one dtype"),
        (lambda x, w, b, t: (x[:, 1:], w, b, t), "wanted x"),
        (lambda x, w, b, t: (x, w.t().contiguous().t(), b, t), "contiguous"),
        (lambda x, w, b, t: (x, w, b[:2], t), "wanted x"),
    ],
)
def test_what_does_not_fit_is_refused(change, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        linear_rotate(*change(*layer(2, 6, 8, 4)))


@pytest.mark.parametrize("sign", ["-", "+"])
@needs_loops_in_the_interpreter
def test_a_wrong_sign_is_caught(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = layer(5, 20, 24, 8)
    check(*arguments)

    def turn(first, second, direct1, cross1, direct2, cross2, TRANSPOSED):
        z1, z2 = pairs.turn(first, second, direct1, cross1, direct2, cross2, TRANSPOSED)
        return (z1 + 2 * cross1 * second, z2) if sign == "-" else (z1, z2 - 2 * cross2 * first)

    monkeypatch.setattr(matmul, "turn", turn)
    with pytest.raises(AssertionError):
        check(*arguments)
