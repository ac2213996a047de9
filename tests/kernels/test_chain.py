"""Rotations in a row: every implementation gives, bit for bit, what each row alone through its rotations gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from tests.kernels import cases
from torch import Tensor

from roadie.errors import AdapterError, KernelError, RoutingError
from roadie.kernels import Chain, Implementation, RotationTable, prepare_rotation, rotate, rotate_, using
from roadie.kernels.contract import OF_INPUT
from roadie.kernels.cpu import CpuImplementation, table_work
from roadie.kernels.step import row_rotations, turns_of
from roadie.rotation import Rotation
from roadie.rotation import rotate as in_a_row
from roadie.testing.accuracy import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Group sizes of each slot; 0: no rotation there. Nested ones, others, more than a block of columns, fewer rotations.
NESTED = ((2, 16, 64), (64, 0, 0), (2, 8, 0), (32, 32, 2))
OTHERS = ((6, 4, 96), (2, 0, 0), (96, 12, 0))
LARGE = ((2, 1536, 12), (1536, 0, 0), (3072, 2, 0))
WIDTHS = {NESTED: 128, OTHERS: 96, LARGE: 3072}


def chain_of(sizes: Sequence[Sequence[int]], width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for stage in zip(*sizes, strict=True):
        direct, cross = (torch.randn(len(sizes), width, generator=generator).to(dtype) for _ in range(2))
        uniform = len(set(stage)) == 1
        tables.append(RotationTable(direct, cross, stage[0] if uniform else torch.tensor(stage, dtype=torch.int32)))
    return tuple(tables)


def alone(x: Tensor, chain: Chain, slot: int) -> Tensor:
    """A row through the rotations of its slot, by `roadie.rotation`."""
    sizes = [t.group_sizes if isinstance(t.group_sizes, int) else int(t.group_sizes[slot]) for t in chain]
    stages = [Rotation(t.direct[slot], t.cross[slot], size) for t, size in zip(chain, sizes, strict=True) if size]
    return in_a_row(x, *stages) if slot >= 0 else x.clone()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", cases.CPU_AND_EAGER)
@pytest.mark.parametrize("narrow", [False, True], ids=["tables in float32", "tables in x's dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [NESTED, OTHERS, LARGE], ids=["nested", "others", "large"])
def test_each_row_is_that_row_alone(sizes, dtype, narrow, name):
    width, slots = WIDTHS[sizes], torch.tensor([1, 0, -1, 2, 0, len(sizes) - 1])
    chain = chain_of(sizes, width, dtype if narrow else torch.float32)
    x = torch.randn(len(slots), 3, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, 0], x[2, 1, 3] = torch.inf, torch.nan  # a slot with fewer rotations does not spread them, nor does the base
    before = x.clone()
    with using(name):
        z = rotate(x, chain, slots)
        assert_same_bits(x, before, "x")
        for row, slot in enumerate(slots.tolist()):
            assert_same_bits(z[row], alone(x[row], chain, slot), f"row {row}, slot {slot}")
        in_place = rotate_(x, chain, slots)
        assert in_place is x
        assert_same_bits(x, z, "in place")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_strides_and_slots_of_tokens_change_nothing(dtype):
    chain = chain_of(NESTED, 128)
    slots = torch.randint(-1, 4, (8, 700), generator=torch.Generator().manual_seed(2))
    x = torch.randn(8, 700, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.set_num_threads(1)
    one = rotate(x, chain, slots)
    torch.set_num_threads(2)
    assert_same_bits(rotate(x, chain, slots), one, "two threads")
    with using("eager"):
        assert_same_bits(rotate(x, chain, slots), one, "eager")
    wide = torch.zeros(8, 700, 256, dtype=dtype)
    wide[..., :128] = x
    assert_same_bits(rotate(wide[..., :128], chain, slots), one, "strided")
    flat = wide.view(-1, 256)[:, :128]
    rotate_(flat, chain, slots.view(-1))
    assert_same_bits(flat.unflatten(0, (8, 700)), one, "strided, in place")
    assert not wide[..., 128:].any()


def test_tables_that_rows_read_count_as_work_to_share_and_those_of_one_slot_do_not():
    chain = chain_of(NESTED, 128)

    def work(slots):
        return table_work([row_rotations(torch.empty(6, 128), t, slots) for t in chain])

    assert work(None) == 0
    assert (
        work(torch.tensor([0, 1, 2])) == 2 * 3 * 3 * 2 * 128 * 4
    )  # twice: 3 rotations, 3 slots, direct and cross, float32
    assert work(torch.tensor([0, 1, 2, 3, 0, 1])) == 2 * 3 * 4 * 2 * 128 * 4  # at most every slot


def test_one_slot_for_all_rows_and_a_chain_of_one():
    chain = chain_of([(2, 16, 64)], 128)
    x = torch.randn(5, 128)
    assert_same_bits(rotate(x, chain, None), alone(x, chain, 0), "slot 0")
    assert_same_bits(rotate(x, chain[:1], None), rotate(x, chain[0], None), "one rotation")
    empty = torch.empty(0, 128)
    assert rotate(empty, chain, None).shape == empty.shape


@cases.needs_compiled_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_it_is_the_same_and_refuses_what_it_was_not_made_for(dtype):
    chain, slots = chain_of(NESTED, 128), torch.tensor([1, 0, -1, 2])
    x = torch.randn(4, 7, 128).to(dtype)
    wanted = rotate(x, chain, slots)
    prepared = prepare_rotation(x, chain, slots)
    assert prepared is not None
    y, z = x.clone(), torch.full_like(x, 7.0)
    assert prepared(y, z)
    assert_same_bits(y, x, "the argument of a rotation into other memory")
    assert_same_bits(z, wanted, "prepared, into other memory")
    assert prepared(y)
    assert_same_bits(y, wanted, "prepared")
    others = {
        "another dtype": x.double(),
        "other rows": x[:3].clone(),
        "another width": x[..., :64].contiguous(),
        "gaps": x.transpose(0, 1).contiguous().transpose(0, 1),
        "no rows": x[:, :0].clone(),
        "a scalar": x[0, 0, 0].clone(),
        "a subclass": torch.nn.Parameter(x.clone(), requires_grad=False),
        "another device": x.to("meta"),
        "no tensor": 7,
        "much work": torch.zeros(4, 3000, 128).to(dtype),
    }
    for what, other in others.items():
        before = other.clone() if isinstance(other, torch.Tensor) else other
        assert not prepared(other), what
        if isinstance(other, torch.Tensor) and other.device.type == "cpu":
            assert_same_bits(other.detach().reshape(-1), before.detach().reshape(-1), what)
    assert not prepared(x.clone(), z.double()), "into another dtype"
    assert not prepared(x.clone(), z[:2].clone()), "into another size"
    assert not prepared(x.clone(), 7), "into no tensor"
    assert not prepared()


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", cases.CPU_AND_EAGER)
def test_gradients_in_float32_are_those_of_float64(name, routed):
    chain = chain_of(NESTED, 128)
    slots = torch.tensor([1, 0, -1, 2, 0, 3]) if routed else None
    x = torch.randn(6, 4, 128, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype)] + [v.to(dtype) for t in chain for v in (t.direct, t.cross)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        tables = [RotationTable(*leaves[2 * k + 1 : 2 * k + 3], t.group_sizes) for k, t in enumerate(chain)]
        return torch.autograd.grad((rotate(leaves[0], tuple(tables), slots) * probe.to(dtype)).sum(), leaves)

    with using(name):
        narrow = gradients(torch.float32)
    for got, wanted in zip(narrow, gradients(torch.float64), strict=True):
        # 3 rotations forward and 3 back round by 2u each, sums of 24 rows by 24u; |R| is below 10 here in norm, cubed.
        torch.testing.assert_close(
            got.double(), wanted, rtol=0, atol=2**-24 * (12 + 24) * float(wanted.abs().max()) * 10
        )


@cases.needs_compiled_kernel
@pytest.mark.parametrize("narrow", [False, True], ids=["tables in float32", "tables in x's dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [NESTED, OTHERS, LARGE, ((2, 16, 64),)], ids=["nested", "others", "large", "uniform"])
def test_backward_in_one_call_gives_what_backward_stage_by_stage_gives(sizes, dtype, narrow):
    check_backward_in_one_call(sizes, dtype if narrow else torch.float32, dtype)


def check_backward_in_one_call(sizes, table_dtype: torch.dtype, dtype: torch.dtype) -> None:
    width, generator = WIDTHS.get(sizes, 3072), torch.Generator().manual_seed(1)
    chain, slots = chain_of(sizes, width, table_dtype), torch.randint(-1, len(sizes), (100,), generator=generator)
    x, grad = (torch.randn(300, width, generator=generator).to(dtype) for _ in range(2))  # more rows than a task has
    implementation, turns = CpuImplementation(), turns_of(x, chain, slots)

    def gradients(backward: Callable[..., None], want_x: bool, is_kept: bool) -> list[Tensor]:
        grad_x = torch.full_like(grad, torch.nan) if want_x else None
        sums = torch.full((2 * len(chain), len(sizes), width), torch.nan) if is_kept else None
        backward(grad, x if is_kept else None, grad_x, turns, sums, OF_INPUT)
        return [made for made in (grad_x, sums) if made is not None]

    for wanted in ((True, True), (True, False), (False, True)):
        found = gradients(implementation.backward_chain, *wanted)
        by_stage = gradients(partial(Implementation.backward_chain, implementation), *wanted)
        for got, expected in zip(found, by_stage, strict=True):
            assert torch.equal(got, expected), f"gradients of x, of the tables: {wanted}"  # 0 and -0 are equal


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
def test_gradients_are_those_of_differences(routed):
    sizes = ((2, 4, 8), (8, 0, 0), (4, 2, 0))
    chain, slots = chain_of(sizes, 8, torch.float64), torch.tensor([1, 0, -1, 2, 0]) if routed else None
    leaves = [torch.randn(5, 2, 8, dtype=torch.float64)] + [v for t in chain for v in (t.direct, t.cross)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def rotated(x: Tensor, *vectors: Tensor) -> Tensor:
        pairs = zip(vectors[::2], vectors[1::2], chain, strict=True)
        return rotate(x, tuple(RotationTable(d, c, t.group_sizes) for d, c, t in pairs), slots)

    assert torch.autograd.gradcheck(rotated, leaves)
    assert torch.autograd.gradgradcheck(rotated, leaves)


def test_bad_arguments_are_refused_before_anything_is_written():
    chain = chain_of(NESTED, 128)
    x = torch.randn(2, 128)
    before = x.clone()
    with pytest.raises(AdapterError, match="two tables"):
        rotate(x, (*chain, chain_of(NESTED, 64)[0]), torch.tensor([0, 1]))
    with pytest.raises(RoutingError, match="int64"):
        rotate(x, chain, torch.tensor([0, 1], dtype=torch.int32))
    assert_same_bits(x, before, "x")


@cases.needs_compiled_kernel
def test_the_compiled_kernel_refuses_slots_and_sizes_before_anything_is_written():
    chain = chain_of(NESTED, 128)
    x = torch.randn(2, 128)
    before = x.clone()
    for slots in ([0, 4], [0, -2]):
        with pytest.raises(KernelError, match="a slot is not between"):
            rotate_(x, chain, torch.tensor(slots))
    odd = RotationTable(chain[0].direct, chain[0].cross, torch.tensor([2, 6, 2, 2], dtype=torch.int32))
    with pytest.raises(KernelError, match="a group size is not even, or does not divide"):
        rotate_(x, (*chain, odd), torch.tensor([0, 1]))
    assert_same_bits(x, before, "x")


@pytest.mark.parametrize("slots", [[0, 4], [0, -2]])
def test_plain_operations_refuse_slots_before_anything_is_written(slots):
    chain = chain_of(NESTED, 128)
    gaps = (RotationTable(table.direct, table.cross, torch.tensor([0, 2, 2, 2], dtype=torch.int32)) for table in chain)
    x = torch.randn(2, 128)
    before = x.clone()
    with using("eager"), pytest.raises(KernelError, match=r"got slots from .* wanted -1 \(the base\) to 3"):
        rotate_(x, tuple(gaps), torch.tensor(slots))
    assert_same_bits(x, before, "x")


@pytest.mark.slow
def test_triton_gives_the_same_in_its_interpreter():
    code = (
        "import torch, sys\n"
        "sys.path.insert(0, 'tests/kernels')\n"
        "import test_chain as t\n"
        "chain, slots = t.chain_of(t.NESTED, 128), torch.tensor([1, 0, -1, 2, 0, 3])\n"
        "x = torch.randn(6, 3, 128)\n"
        "wanted = t.rotate(x, chain, slots)\n"
        "with t.using('triton'):\n"
        "    t.assert_same_bits(t.rotate(x, chain, slots), wanted, 'triton')\n"
        "print('same')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
