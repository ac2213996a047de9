"""The reference implementation against R written out entry by entry in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import cases

from roadie.errors import KernelError
from roadie.kernels import eager
from roadie.kernels.eager import EagerImplementation
from roadie.testing.accuracy import assert_same_bits

EAGER = EagerImplementation()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One rotation for all rows, rows of their own, several rows a slot, and group sizes of their own.
SHAPES = {
    "one rotation": {"rows": 5, "width": 24, "sizes": 8},
    "rows": {"rows": 6, "width": 16, "sizes": 4, "num_slots": 3, "slots": (2, -1, 0, 2, 0, -1)},
    "repeat": {"rows": 6, "width": 12, "sizes": 6, "num_slots": 3, "slots": (2, -1, 0), "repeat": 2},
    "sizes": {"rows": 5, "width": 24, "sizes": (2, 12, 8), "num_slots": 3, "slots": (2, 1, -1, 0, 2)},
    "the first size": {"rows": 3, "width": 24, "sizes": (6, 2), "num_slots": 2},
    "strided": {"rows": 4, "width": 8, "sizes": 4, "padding": 3},
    "no rows of a slot": {"rows": 2, "width": 4, "sizes": 2, "num_slots": 3, "slots": (1, 1)},
    "the base alone": {"rows": 2, "width": 4, "sizes": 2, "slots": (-1, -1)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", [cases.check_forward, cases.check_backward, cases.check_in_place])
def test_it_is_the_truth_within_rounding(check, shape: str, dtype: torch.dtype) -> None:
    check(EAGER, cases.batch(**SHAPES[shape], dtype=dtype))


@settings(max_examples=30)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from((2, 4, 6, 8, 12, 24)), min_size=1, max_size=3),
    st.data(),
)
def test_any_shape(dtype: torch.dtype, sizes: list[int], data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(-1, len(sizes) - 1), max_size=6))
    repeat = data.draw(st.integers(1, 3))
    b = cases.batch(
        len(slots) * repeat, 24, sizes, num_slots=len(sizes), slots=slots, repeat=repeat, dtype=dtype,
        padding=data.draw(st.integers(0, 2)),
    )  # fmt: skip
    cases.check_forward(EAGER, b)
    cases.check_backward(EAGER, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_make_the_whole(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b = cases.batch(**SHAPES[shape])
    whole = cases.turned(EAGER, b)
    monkeypatch.setattr(eager, "ELEMENTS_A_PIECE", 1)
    assert_same_bits(cases.turned(EAGER, b), whole, "in pieces")
    cases.check_backward(EAGER, b)


def test_many_pieces() -> None:
    cases.check_backward(EAGER, cases.batch(3 * (1 << 18) // 64 + 5, 64, 8))


def test_rows_of_the_base_keep_what_is_not_finite() -> None:
    b = cases.batch(2, 4, num_slots=1, slots=(-1, 0))
    b.x[0] = torch.tensor([torch.inf, torch.nan, -0.0, -torch.inf])
    b.gradient[0] = b.x[0]
    assert_same_bits(cases.turned(EAGER, b)[0], b.x[0], "base row")
    assert_same_bits(cases.turned_back(EAGER, b)[0][0], b.x[0], "gradient of a base row")
    assert cases.turned(EAGER, b)[1].isfinite().all()


def test_rows_of_the_base_take_no_part_in_sums() -> None:
    b = cases.batch(3, 4, num_slots=1, slots=(0, -1, 0))
    b.kept[1] = torch.nan
    assert all(total.isfinite().all() for total in cases.turned_back(EAGER, b)[1:])


def test_sums_are_the_same_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, 3, (600,), generator=generator).tolist()
    b = cases.batch(600, 256, 64, num_slots=3, slots=slots)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = cases.turned_back(EAGER, b)
        torch.set_num_threads(2)
        for _ in range(3):
            for value, expected in zip(cases.turned_back(EAGER, b), wanted, strict=True):
                assert_same_bits(value, expected, "with two threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("slots", [(0, 2), (0, -2)])
def test_a_slot_out_of_range_is_refused(slots: tuple[int, ...]) -> None:
    b = cases.batch(2, 4, num_slots=2, slots=slots)
    with pytest.raises(KernelError, match="slot"):
        cases.turned(EAGER, b)
    with pytest.raises(KernelError, match="slot"):
        cases.turned_back(EAGER, b)


@pytest.mark.parametrize("size", [0, 3, 6, -2])
def test_a_group_size_that_does_not_fit_is_refused(size: int) -> None:
    b = cases.batch(2, 4, (2, size), num_slots=2, slots=(0, 1))
    with pytest.raises(KernelError, match="group size"):
        cases.turned(EAGER, b)
    with pytest.raises(KernelError, match="group size"):
        cases.turned_back(EAGER, b)
