"""Triton's kernels in its interpreter, against R written out entry by entry in float64, and against the reference.

In float32 the interpreter computes what a GPU does. Its stores to bfloat16 cut digits off where they should round, so that
half precision is held to twice the bound there; that of rounding is for tests/gpu.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels import cases
from tests.laws.bounds import assert_within, wide
from tests.versions import needs_loops_in_the_interpreter

from roadie.kernels.contract import OF_INPUT, OF_OUTPUT, Implementation, RowRotations
from roadie.kernels.eager import EagerImplementation, solved
from roadie.kernels.triton import TritonImplementation, backward, tasks, tiles
from roadie.kernels.triton.tasks import most_tasks
from roadie.testing.accuracy import assert_as_accurate_as, assert_same_bits, unit_roundoff

TRITON, EAGER = TritonImplementation(), EagerImplementation()
CPU = torch.device("cpu")
NAN = torch.nan

SHAPES = {
    "one rotation": {"rows": 5, "width": 24, "sizes": 8},
    "neighbours": {"rows": 3, "width": 22, "sizes": 2},
    "parted in registers": {"rows": 3, "width": 36, "sizes": 4},
    "halves of three": {"rows": 3, "width": 30, "sizes": 6},
    "halves of five": {"rows": 2, "width": 50, "sizes": 10},
    "one large group": {"rows": 2, "width": 48, "sizes": 48},
    "one pair": {"rows": 1, "width": 2},
    "no rows": {"rows": 0, "width": 4},
    "no routed rows": {"rows": 0, "width": 4, "num_slots": 2, "slots": ()},
    "rows": {"rows": 6, "width": 16, "sizes": 4, "num_slots": 3, "slots": (2, -1, 0, 2, 0, -1)},
    "repeat": {"rows": 15, "width": 12, "sizes": 6, "num_slots": 3, "slots": (2, -1, 0, 2, 2), "repeat": 3},
    "sizes": {"rows": 5, "width": 24, "sizes": (2, 12, 8), "num_slots": 3, "slots": (2, 1, -1, 0, 2)},
    "the first size": {"rows": 3, "width": 24, "sizes": (6, 2), "num_slots": 2},
    "strided": {"rows": 4, "width": 8, "sizes": 4, "padding": 3},
    "slot 0 of two": {"rows": 5, "width": 8, "sizes": 4, "num_slots": 2},
    "no rows of a slot": {"rows": 2, "width": 4, "sizes": 2, "num_slots": 3, "slots": (1, 1)},
    "the base alone": {"rows": 2, "width": 4, "sizes": 2, "slots": (-1, -1)},
}
CHECKS = (cases.check_forward, cases.check_backward, cases.check_in_place)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Few rows and pairs a program, so that small batches need many programs, and several steps of each."""
    with (
        mock.patch.object(tiles, "rotate_tile", return_value=tiles.Tile(2, 4, 2, 1)),
        mock.patch.object(tiles, "backward_tile", return_value=tiles.Tile(2, 4, 2, 1)),
        mock.patch.object(backward, "TASKS_AT_ONCE", 2),
        mock.patch.object(backward, "PAIRS", 8),
    ):
        yield


def test_it_can_run_here() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert TRITON.refusal(CPU, dtype, torch.float32) is None, "TRITON_INTERPRET=1 came after triton was imported"
        assert TRITON.refusal(CPU, dtype, dtype) is None


def test_what_it_cannot_do_is_said() -> None:
    assert "float64" in str(TRITON.refusal(CPU, torch.float64, torch.float32))
    assert "tables" in str(TRITON.refusal(CPU, torch.float16, torch.bfloat16))
    assert "meta" in str(TRITON.refusal(torch.device("meta"), torch.float32, torch.float32))


WITHOUT = """
import os, sys
{before}
import torch
from roadie.kernels.triton import TritonImplementation
print(TritonImplementation().refusal(torch.device("cpu"), torch.float32, torch.float32))
"""


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['triton'] = None", "triton cannot be imported"),
        ("os.environ['TRITON_INTERPRET'] = '0'", "it runs on GPUs"),
        (
            "os.environ['TRITON_INTERPRET'] = '0'; import triton; os.environ['TRITON_INTERPRET'] = '1'",
            "it runs on GPUs",
        ),
        ("os.environ['TRITON_INTERPRET'] = '1'", "None"),
    ],
)
@pytest.mark.slow
def test_what_triton_was_imported_as_decides(before: str, reason: str) -> None:
    code = WITHOUT.format(before=before)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith(reason), out.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "check",
    [pytest.param(c, marks=needs_loops_in_the_interpreter) if c is cases.check_backward else c for c in CHECKS],
)
def test_it_is_the_truth_within_rounding(check, shape: str) -> None:
    check(TRITON, cases.batch(**SHAPES[shape]))
    with small_tiles():
        check(TRITON, cases.batch(**SHAPES[shape]))


@pytest.mark.parametrize("shape", SHAPES)
@needs_loops_in_the_interpreter
def test_it_turns_as_the_reference_does_bit_for_bit(shape: str) -> None:
    cases.check_same_bits(TRITON, EAGER, cases.batch(**SHAPES[shape]))


@pytest.mark.slow
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16], ids=str)
@needs_loops_in_the_interpreter
def test_tables_of_half_the_bytes_turn_rows_of_float32(table_dtype: torch.dtype) -> None:
    for shape in ("one rotation", "rows", "sizes"):
        cases.check_same_bits(TRITON, EAGER, cases.batch(**SHAPES[shape], table_dtype=table_dtype))


def check_both_at_once(implementation: Implementation, b: cases.Batch) -> None:
    """Gradients that are made in the launches that sum are what the reference makes of the sums, but for the sign of zeros."""
    for of_output, want_x in ((False, True), (True, False)):
        back, after = (torch.full_like(b.gradient, torch.nan) for _ in range(2))
        got, wanted = ([torch.full(b.turns.direct.shape, torch.nan) for _ in range(2)] for _ in range(2))
        solve = OF_OUTPUT if of_output else OF_INPUT
        implementation.backward(b.gradient, b.kept, back if want_x else None, b.turns, *got, solve)
        implementation.backward(b.gradient, b.kept, after if want_x else None, b.turns, *wanted)
        wanted = solved(*wanted, b.turns, of_output)
        for value, expected in zip((*got, back), (*wanted, after), strict=True):
            assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert not any(value.isnan().any() for value in got)
        assert bool(back.isnan().any()) == (not want_x and back.numel() > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("shape", SHAPES)
@needs_loops_in_the_interpreter
def test_gradients_are_made_in_the_launches_that_sum(shape: str) -> None:
    check_both_at_once(TRITON, cases.batch(**SHAPES[shape]))
    with small_tiles():
        check_both_at_once(TRITON, cases.batch(**SHAPES[shape]))


def test_rows_are_sorted_once_for_all_layers_that_read_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *given, **named: made.append(given) or sort(*given, **named))
    slots = torch.tensor([[2, -1, 0], [1, 1, 2]])
    first = tasks.tasks_of(slots.view(-1), 1, 3, 4)
    assert tasks.tasks_of(slots.view(-1), 1, 3, 4) is first
    assert len(made) == 1
    assert len(tasks.tasks_of(slots.view(-1), 4, 3, 8).group) == most_tasks(6, 4, 3, 8)
    slots[0, 0] = 0
    again = tasks.tasks_of(slots.view(-1), 1, 3, 4)
    assert first.bounds.tolist() == [0, 1, 2, 4, 6]
    assert again.bounds.tolist() == [0, 1, 3, 5, 6]


@settings(max_examples=8)
@given(st.lists(st.sampled_from((2, 4, 6, 8, 12, 24)), min_size=1, max_size=3), st.booleans(), st.data())
@needs_loops_in_the_interpreter
@pytest.mark.slow
def test_any_shape(sizes: list[int], uniform: bool, data: st.DataObject) -> None:
    slots = data.draw(st.none() | st.lists(st.integers(-1, len(sizes) - 1), max_size=6))
    repeat = 1 if slots is None else data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(0, 6)) if slots is None else len(slots) * repeat
    b = cases.batch(
        rows, 24, sizes[0] if uniform else sizes, num_slots=len(sizes), slots=slots, repeat=repeat,
        padding=data.draw(st.integers(0, 2)), seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    with small_tiles():
        for check in CHECKS:
            check(TRITON, b)


@pytest.mark.slow
@needs_loops_in_the_interpreter
def test_the_widest_layer_of_a_llama() -> None:
    b = cases.batch(2, 11008, 64)
    cases.check_same_bits(TRITON, EAGER, b)
    assert_same_bits(cases.turned_back(TRITON, b)[1], b.gradient[:1] * b.kept[:1] + b.gradient[1:] * b.kept[1:], "own")


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, "mixed"])
@needs_loops_in_the_interpreter
def test_sums_are_as_accurate_as_the_reference(slots: str | None) -> None:
    routed = None if slots is None else (torch.arange(500) % 3 - 1).tolist()
    b = cases.batch(500, 64, 8, num_slots=2, slots=routed)
    truth = cases.turned_back(EAGER, _in_float64(b))
    for value, rival, exact in zip(cases.turned_back(TRITON, b), cases.turned_back(EAGER, b), truth, strict=True):
        assert_as_accurate_as(value, rival, exact)


def _in_float64(b: cases.Batch) -> cases.Batch:
    turns = b.turns._replace(direct=b.turns.direct.double(), cross=b.turns.cross.double())
    return cases.Batch(b.x.double(), b.gradient.double(), b.kept.double(), turns)


@pytest.mark.slow
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["float32 table", "narrow table"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["one rotation", "neighbours", "sizes"])
@needs_loops_in_the_interpreter
def test_half_precision_is_off_by_one_truncation(
    shape: str, dtype: torch.dtype, table_dtype: torch.dtype | None
) -> None:
    """Cutting digits off errs by less than one step of the dtype, 2 u |z|: twice what rounding errs by.

    The reference, in float64 inputs rounded alike, is the truth; its float32 part (2 u |R| |x|) is added.
    """
    b = cases.batch(**SHAPES[shape], dtype=dtype, table_dtype=table_dtype or dtype)
    exact = _in_float64(b)
    reach = cases.turned(EAGER, cases.Batch(exact.x.abs(), exact.gradient, exact.kept, _absolute(exact.turns)))
    got, truth = cases.turned(TRITON, b), cases.turned(EAGER, exact)
    assert got.dtype == dtype
    bound = 2 * unit_roundoff(dtype) * truth.abs() + 4 * unit_roundoff(torch.float32) * reach
    assert_within(got, truth, bound + torch.finfo(dtype).smallest_normal, "z")
    (grad_x, *sums), (exact_x, *exact_sums) = cases.turned_back(TRITON, b), cases.turned_back(EAGER, exact)
    assert grad_x.dtype == dtype
    assert_within(grad_x, exact_x, bound.max() + 2 * unit_roundoff(dtype) * exact_x.abs(), "grad_x")
    for value, wanted in zip(sums, exact_sums, strict=True):  # sums are float32: nothing is cut
        assert value.dtype == wide(dtype)
        assert_within(value, wanted, torch.full_like(wanted, 32 * unit_roundoff(torch.float32)), "sums")


def _absolute(turns: RowRotations) -> RowRotations:
    """A table whose rotation of |x| bounds what the rotation of x can reach: cross with the signs that J would take away."""
    sizes = [turns.group_size] * len(turns.direct) if turns.sizes is None else turns.sizes.tolist()
    sign = torch.stack([_signs(size, turns.direct.shape[1]) for size in sizes])
    return turns._replace(direct=turns.direct.abs(), cross=turns.cross.abs() * sign)


def _signs(group_size: int, width: int) -> Tensor:
    return torch.where(torch.arange(width) % group_size < group_size // 2, -1.0, 1.0).double()


@needs_loops_in_the_interpreter
def test_rows_of_the_base_keep_what_is_not_finite() -> None:
    b = cases.batch(3, 4, num_slots=1, slots=(-1, 0, 0))
    b.x[0] = torch.tensor([torch.inf, torch.nan, -0.0, -torch.inf])
    b.gradient[0] = b.x[0]
    assert_same_bits(cases.turned(TRITON, b)[0], b.x[0], "base row")
    assert_same_bits(cases.turned_back(TRITON, b)[0][0], b.x[0], "gradient of a base row")
    b.kept[0] = NAN
    assert all(total.isfinite().all() for total in cases.turned_back(TRITON, b)[1:])


@pytest.mark.slow
@needs_loops_in_the_interpreter
def test_scratch_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch that starts as NaN leaves no trace, also where most of the tasks that there could be do not exist."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))
    for shape in ("repeat", "no rows of a slot", "slot 0 of two"):
        with small_tiles():
            cases.check_backward(TRITON, cases.batch(**SHAPES[shape]))


@pytest.mark.slow
@needs_loops_in_the_interpreter
def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most own and partner, a row of each for the base, and 8 / N of a float32 batch; none for one task."""
    taken: list[int] = []
    empty = torch.empty

    def counted(*size: int, **options: object) -> Tensor:
        made = empty(*size, **options)
        taken.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "empty", counted)
    for rows, slots in ((20, None), (1000, None), (400, (torch.arange(400) % 5 - 1).tolist())):
        b = cases.batch(rows, 8, 4, num_slots=4 if slots else 1, slots=slots)
        taken.clear()
        own, partner = (torch.full(b.turns.direct.shape, NAN) for _ in range(2))
        TRITON.backward(b.gradient, b.kept, None, b.turns, own, partner)
        table, rows_a_task = own.numel() * 4, 32
        assert sum(taken) <= 2 * (table + 8 * 4) + 8 / rows_a_task * b.x.numel() * 4 * (rows > rows_a_task)
        if rows <= rows_a_task:
            assert not taken


@pytest.mark.slow
@needs_loops_in_the_interpreter
def test_sums_are_the_same_in_every_run() -> None:
    slots = (torch.arange(20) * 7 % 4 - 1).tolist()
    b = cases.batch(40, 12, 6, num_slots=3, slots=slots, repeat=2)
    with small_tiles():
        wanted = cases.turned_back(TRITON, b)
        for value, expected in zip(cases.turned_back(TRITON, b), wanted, strict=True):
            assert_same_bits(value, expected, "again")


@needs_loops_in_the_interpreter
def test_the_gradient_may_be_written_over() -> None:
    b = cases.batch(**SHAPES["repeat"])
    wanted = cases.turned_back(TRITON, b)[0]
    x = b.gradient.clone()
    TRITON.backward(x, None, x, b.turns, None, None)
    assert_same_bits(x, wanted, "in place")


@pytest.mark.parametrize("slots", [None, (0, 1)])
@needs_loops_in_the_interpreter
def test_offsets_beyond_32_bits(slots: Sequence[int] | None) -> None:
    """Two rows 2^31 elements apart: virtual memory that is hardly touched."""
    b = cases.batch(2, 8, 4, num_slots=2, slots=slots, dtype=torch.float16, table_dtype=torch.float32)
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2, 8), (2**31, 1))
    wanted, wanted_back = cases.turned(TRITON, b), cases.turned_back(TRITON, b)
    TRITON.rotate(far.copy_(b.x), far, b.turns)
    assert_same_bits(far.clone(), wanted, "z")
    own, partner = (torch.full(b.turns.direct.shape, NAN) for _ in range(2))
    TRITON.backward(far.copy_(b.gradient), b.kept, far, b.turns, own, partner)
    for value, expected in zip((far.clone(), own, partner), wanted_back, strict=True):
        assert_same_bits(value, expected, "backward")
