"""The compiled implementation: the bits of the reference, and sums as near to the truth as its."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import cases
from tests.patience import HANG_S
from torch import Tensor

from roadie.errors import KernelError
from roadie.kernels import RowRotations, cpu
from roadie.kernels.contract import OF_INPUT, table_dtypes
from roadie.kernels.cpu import CpuImplementation
from roadie.kernels.eager import EagerImplementation
from roadie.testing.accuracy import assert_same_bits

CPU, EAGER = CpuImplementation(), EagerImplementation()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPES = [(dtype, table) for dtype in DTYPES for table in table_dtypes(dtype)]
GROUP_SIZES = (2, 4, 6, 8, 10, 16, 32, 48, 64, 96, 128)
# Below this a float32 is subnormal; bfloat16 has the same range. AVX512_BF16 gives such results as zeros.
SMALLEST_NORMAL = 2.0**-126

pytestmark = pytest.mark.skipif(
    CPU.refusal(torch.device("cpu"), torch.float32, torch.float32) is not None, reason="there is no compiled kernel"
)


def ids(types: tuple[torch.dtype, torch.dtype]) -> str:
    return f"{types[0]}-{types[1]}".replace("torch.", "")


def same_bits_but_subnormal(value: Tensor, b: cases.Batch) -> None:
    """The reference's bits, but in bfloat16 for a zero of the same sign where the result in float32 is subnormal."""
    wanted = cases.turned(EAGER, b)
    if b.x.dtype == torch.bfloat16:
        exact = cases.turned(EAGER, cases.Batch(b.x.float(), b.gradient, b.kept, widened(b.turns)))
        flushed = (exact.abs() < SMALLEST_NORMAL) & (value == 0)
        wanted = torch.where(flushed, torch.zeros_like(wanted).copysign(exact.bfloat16()), wanted)
    cases.assert_same_but_nan(value, wanted, "z")


def widened(turns: RowRotations) -> RowRotations:
    return turns._replace(direct=turns.direct.float(), cross=turns.cross.float())


@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_it_has_the_bits_of_the_reference(group_size: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    for groups in (1, 3, 13):
        kinds = {
            "one": {"rows": 3},
            "routed": {"rows": 8, "num_slots": 3, "slots": (2, -1, 0, 2), "repeat": 2, "padding": 5, "offset": 1},
        }
        for kind in kinds.values():
            b = cases.batch(width=group_size * groups, sizes=group_size, dtype=types[0], table_dtype=types[1], **kind)
            cases.check_same_bits(CPU, EAGER, b)
            cases.check_in_place(CPU, b)


@settings(max_examples=150)
@given(st.sampled_from(TYPES), st.sampled_from([(g,) for g in GROUP_SIZES] + [(2, 96, 16), (4, 12, 8, 6)]), st.data())
def test_any_shape(types: tuple[torch.dtype, torch.dtype], sizes: tuple[int, ...], data: st.DataObject) -> None:
    repeat, uniform = data.draw(st.integers(1, 4)), len(sizes) == 1
    num_slots = data.draw(st.integers(1, 5)) if uniform else len(sizes)
    slots = data.draw(st.lists(st.integers(-1, num_slots - 1), max_size=40))
    width = data.draw(st.integers(1, 12)) * (sizes[0] if uniform else 96 // (1 if 16 in sizes else 4))
    b = cases.batch(
        len(slots) * repeat, width, sizes[0] if uniform else sizes, num_slots=num_slots, slots=slots, repeat=repeat,
        dtype=types[0], table_dtype=types[1], padding=data.draw(st.integers(0, 20)), offset=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    cases.check_same_bits(CPU, EAGER, b)
    cases.check_in_place(CPU, b)
    cases.check_sums_within_rounding(CPU, EAGER, b)


@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("group_size", [2, 8, 6, 32])
def test_it_is_the_truth_within_rounding(group_size: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    slots = (0, 1, -1, 1, 0, 0)
    b = cases.batch(12, 96, group_size, num_slots=3, slots=slots, repeat=2, dtype=types[0], table_dtype=types[1])
    cases.check_forward(CPU, b)
    cases.check_backward(CPU, b)


# 1100 and 2048 columns are cut into strips; 128 rows of a slot are a task.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "size"), [(5000, 64, 16), (1, 2048, 64), (17, 1100, 10), (700, 1200, 6)])
@pytest.mark.parametrize("num_slots", [1, 4])
def test_sums_are_as_accurate_as_the_reference(
    num_slots: int, rows: int, width: int, size: int, dtype: torch.dtype
) -> None:
    slots = None if num_slots == 1 else torch.arange(rows).mul(7).remainder(num_slots).sub(1).tolist()
    b = cases.batch(rows, width, size, num_slots=num_slots, slots=slots, dtype=dtype)
    cases.check_sums_as_accurate(CPU, EAGER, b)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits_with_one_and_two_threads(dtype: torch.dtype) -> None:
    slots = torch.arange(1500).mul(7).remainder(4).sub(1).tolist()
    b = cases.batch(3000, 384, 64, num_slots=3, slots=slots, repeat=2, dtype=dtype)
    assert 2 * b.x.numel() * b.x.element_size() >= 2 * cpu.BYTES_A_THREAD, "too small to be shared out"
    check_threads_agree(b)


def check_threads_agree(b: cases.Batch) -> None:
    torch.set_num_threads(1)
    wanted = cases.turned(CPU, b), *cases.turned_back(CPU, b)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        for value, expected in zip((cases.turned(CPU, b), *cases.turned_back(CPU, b)), wanted, strict=True):
            assert_same_bits(value, expected, f"{threads} threads")


@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (200, 2200)])
def test_more_threads_than_rows_or_columns(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    b = cases.batch(*shape, 8, num_slots=2, slots=[1, *[0] * (shape[0] - 1)])
    wanted = cases.turned(CPU, b), *cases.turned_back(CPU, b)
    for threads in (2, 3, 7):
        monkeypatch.setattr(cpu, "threads_for", lambda nbytes, threads=threads: threads)
        for value, expected in zip((cases.turned(CPU, b), *cases.turned_back(CPU, b)), wanted, strict=True):
            assert_same_bits(value, expected, f"{threads} threads")


def test_small_work_is_done_by_one_thread() -> None:
    assert cpu.threads_for(2 * cpu.BYTES_A_THREAD - 1) == 1


def patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a half-precision dtype, NaN of all kinds included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def identity_of(width: int, group_size: int) -> RowRotations:
    """direct 1; cross of such signs that its products with positive numbers are -0.0, which changes nothing."""
    cross = torch.zeros(1, width)
    is_second = torch.arange(width) % group_size >= group_size // 2
    cross[0, is_second] = -0.0
    return RowRotations(torch.ones(1, width), cross, None, 1, None, group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 6, 32, 64])
def test_every_number_comes_through_the_identity(group_size: int, dtype: torch.dtype) -> None:
    width = 192
    for second in (False, True):
        member = torch.arange(width) % group_size >= group_size // 2
        here = member if second else ~member
        x = torch.zeros(-(-(1 << 16) // int(here.sum())), width, dtype=dtype)
        numbers = torch.zeros(len(x) * int(here.sum()), dtype=dtype)
        numbers[: 1 << 16] = patterns(dtype)
        x[:, here] = numbers.view(len(x), -1)
        b = cases.Batch(x, x, x, identity_of(width, group_size))
        z = cases.turned(CPU, b)
        same_bits_but_subnormal(z, b)
        fits = ~(numbers.abs().float() < SMALLEST_NORMAL) | (numbers == 0)  # in float16 all of them
        cases.assert_same_but_nan(z[:, here].reshape(-1)[fits], numbers[fits], "z")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 6, 32])
def test_results_are_rounded_as_torch_rounds(group_size: int, dtype: torch.dtype) -> None:
    width = 96 * 400
    generator = torch.Generator().manual_seed(group_size)
    bits = torch.randint(-(1 << 31), 1 << 31, (width,), generator=generator).to(torch.int32)
    ties, kept_bits = torch.arange(width) % 3, 16 if dtype == torch.bfloat16 else 13
    exact_tie = (bits >> kept_bits << kept_bits) | (1 << (kept_bits - 1))
    around = torch.empty(width).uniform_(2.0**-26, 2.0**17, generator=generator).view(torch.int32)
    numbers = torch.where(ties == 0, bits, torch.where(ties == 1, exact_tie, around)).view(torch.float32)
    turns = identity_of(width, group_size)._replace(direct=numbers[None])
    ones = torch.ones(1, width, dtype=dtype)
    b = cases.Batch(ones, ones, ones, turns)
    z = cases.turned(CPU, b)
    same_bits_but_subnormal(z, b)
    fits = ~(numbers.abs() < SMALLEST_NORMAL) | (numbers == 0)
    cases.assert_same_but_nan(z[0, fits], numbers[fits].to(dtype), "rounded")


@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 6, 32])
def test_special_numbers(group_size: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    b = cases.batch(40, 96, group_size, dtype=types[0], table_dtype=types[1])
    info, generator = torch.finfo(types[0]), torch.Generator().manual_seed(1)
    numbers = (
        torch.inf,
        -torch.inf,
        torch.nan,
        0.0,
        -0.0,
        info.max,
        -info.max,
        info.smallest_normal,
        -info.tiny / 2,
        1,
    )
    special = torch.tensor(numbers, dtype=torch.float64)
    for tensor in (b.x, b.gradient, b.turns.direct, b.turns.cross):
        which = torch.randint(0, 3 * len(special), tensor.shape, generator=generator)
        drawn = which < len(special)
        tensor[drawn] = special[which[drawn]].to(tensor.dtype)
    same_bits_but_subnormal(cases.turned(CPU, b), b)
    assert {True, False} == set(cases.turned(CPU, b).isfinite().flatten().tolist())


def test_rows_of_the_base_keep_what_is_not_finite() -> None:
    b = cases.batch(2, 32, 4, slots=(-1, 0), dtype=torch.bfloat16)
    b.x[0] = torch.tensor([torch.inf, torch.nan, -0.0, -torch.inf] * 8)
    b.x[0].view(torch.int16)[4:8] = torch.tensor([0x7F81, -1, 1, -32767])  # NaN of other bits, and subnormal numbers
    b.gradient[0] = b.x[0]
    b.kept[0] = torch.nan
    grad_x, own, partner = cases.turned_back(CPU, b)
    assert_same_bits(cases.turned(CPU, b)[0], b.x[0], "base row")
    assert_same_bits(grad_x[0], b.x[0], "gradient of a base row")
    assert own.isfinite().all()
    assert partner.isfinite().all()


@pytest.mark.parametrize(("slots", "sizes", "why"), [
    ((0, 2), 4, "slot"), ((0, -2), 4, "slot"), ((0, 1), (2, 3), "group size"), ((0, 1), (2, 0), "group size"),
    ((0, 1), (2, 6), "group size"), ((0, 1), 3, "group size"), ((0, 1), 0, "group size"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(slots: tuple[int, ...], sizes: int | tuple[int, ...], why: str) -> None:
    b = cases.batch(2, 8, sizes, num_slots=2, slots=slots)
    before = b.x.clone()
    with pytest.raises(KernelError, match=why):
        cases.turned(CPU, b)
    with pytest.raises(KernelError, match=why):
        cases.turned_back(CPU, b)
    assert_same_bits(b.x, before, "the input")


SCRATCH = """
import torch
from roadie.kernels.cpu import CpuImplementation
from roadie.kernels.eager import EagerImplementation
from tests.kernels import cases
for rows, width, size, slots in ((3, 40, 8, None), (300, 1100, 10, None), (260, 96, 32, [0, 2, -1, 2] * 65)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        b = cases.batch(rows, width, size, num_slots=4, slots=slots, dtype=dtype)
        cases.check_same_bits(CpuImplementation(), EagerImplementation(), b)
        cases.check_sums_within_rounding(CpuImplementation(), EagerImplementation(), b)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is of the GNU C library")
@pytest.mark.slow
def test_scratch_memory_is_never_read_before_it_is_written(root: Path) -> None:
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}  # new memory is full of 0x7f: numbers near the largest float
    subprocess.run([sys.executable, "-c", SCRATCH], cwd=root, env=environment, check=True, timeout=HANG_S)


@pytest.mark.parametrize("size", [0, 3, 16, -2])
def test_the_size_of_a_slot_that_no_row_uses_is_looked_at_too(size: int) -> None:
    b = cases.batch(2, 8, (2, size), num_slots=2)
    with pytest.raises(KernelError, match="group size"):
        CPU.backward(b.gradient, b.kept, None, b.turns, torch.zeros(2, 8), torch.zeros(2, 8), OF_INPUT)


@pytest.mark.skipif(cpu.loaded().callable is None, reason="torch does not tell C what its tensors are")
def test_what_c_cannot_read_goes_by_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, turns = torch.randn(2, 3, 8), cases.batch(6, 8, 4).turns
    assert cpu.loaded().run(cpu.ROTATE, x, None, x, turns, None, None, 1) < 0  # three dimensions are no rows
    ways = []
    library = cpu.loaded()

    def by_ctypes(*arguments: object) -> int:
        ways.append(arguments[0])
        return type(library).run_by_ctypes(library, *arguments)

    monkeypatch.setattr(library, "run_by_ctypes", by_ctypes)
    z, rows = torch.empty(6, 8), torch.randn(6, 8)
    CPU.rotate(rows, z, turns)
    assert ways == []
    monkeypatch.setattr(library, "run", lambda *_: -1)
    other = torch.empty(6, 8)
    CPU.rotate(rows, other, turns)
    assert ways == [cpu.ROTATE]
    assert_same_bits(other, z, "by ctypes")
