"""The door: what it takes, what it refuses, and what becomes of x."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from roadie.errors import AdapterError, ConfigError, KernelError, RoutingError
from roadie.kernels import Keep, RotationTable, rotate, rotate_, using
from roadie.rotation import Rotation
from roadie.rotation import rotate as rotate_plainly
from roadie.testing.accuracy import assert_same_bits


def table(
    num_slots: int = 2, width: int = 8, sizes: int | Tensor = 4, dtype: torch.dtype = torch.float32
) -> RotationTable:
    generator = torch.Generator().manual_seed(0)
    direct, cross = (torch.randn(num_slots, width, generator=generator).to(dtype) for _ in range(2))
    return RotationTable(direct, cross, sizes)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def one_by_one(x: Tensor, t: RotationTable, slots: Tensor) -> Tensor:
    """Each row by the plain rotation of its slot."""
    sizes = [t.group_sizes] * len(t.direct) if isinstance(t.group_sizes, int) else t.group_sizes.tolist()
    z = x.clone()
    for place in torch.cartesian_prod(*map(torch.arange, slots.shape)).view(-1, slots.dim()).tolist():
        slot = int(slots[tuple(place)])
        if slot >= 0:
            z[tuple(place)] = rotate_plainly(x[tuple(place)], Rotation(t.direct[slot], t.cross[slot], sizes[slot]))
    return z


@pytest.mark.parametrize("implementation", cases.CPU_AND_EAGER)
@settings(max_examples=40)
@given(st.data())
def test_rows_are_rotated_one_by_one(implementation: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    routed = data.draw(st.integers(1, len(shape)))
    slots = torch.randint(-1, 3, shape[:routed], generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    t = table(3, 12, data.draw(st.sampled_from((4, 12, torch.tensor((2, 4, 6), dtype=torch.int32)))))
    x = values(*shape, 12)
    if data.draw(st.booleans()):
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    with skipped_without(implementation):
        assert_same_bits(rotate(x, t, slots), one_by_one(x, t, slots), "rows")
        before = x.clone()
        assert rotate_(x, t, slots) is x
        assert_same_bits(x, one_by_one(before, t, slots), "in place")


def skipped_without(implementation: str) -> object:
    return using(implementation)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_rotation_of_everything(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t, x = table(1), values(*shape, dtype=dtype)
    rotation = Rotation(t.direct[0], t.cross[0], 4)
    z = rotate(x, rotation)
    assert_same_bits(z, rotate_plainly(x, rotation), "rotate")
    assert z.data_ptr() != x.data_ptr() or not x.numel()
    assert rotate_(x, rotation) is x
    assert_same_bits(x, z, "rotate_")


@pytest.mark.parametrize("view", [
    lambda x: x.permute(1, 0, 2), lambda x: x[:, ::2], lambda x: x[..., ::2].transpose(0, 1), lambda x: x[0],
    lambda x: x[:, 0], lambda x: x[:, :, 1:9], lambda x: x.transpose(1, 2)[:, :8].transpose(1, 2), lambda x: x.flip(0),
])  # fmt: skip
def test_any_strides(view) -> None:
    x = view(values(4, 6, 16))
    t = table(1, x.shape[-1])
    rotation = Rotation(t.direct[0], t.cross[0], 4)
    wanted = rotate_plainly(x, rotation)
    z = rotate(x, rotation)
    assert_same_bits(z, wanted, "rotate")
    assert z.is_contiguous()
    assert_same_bits(rotate_(x, rotation), wanted, "rotate_")
    assert_same_bits(x, wanted, "in place")


def test_in_place_writes_nothing_but_its_rows() -> None:
    x = values(4, 16)
    before = x.clone()
    rotate_(x[:, :8], table(1), None)
    assert_same_bits(x[:, 8:].contiguous(), before[:, 8:].contiguous(), "the other columns")
    assert not torch.equal(x, before)


def test_tables_and_sizes_of_any_strides() -> None:
    t = table(4, 16)
    sizes = torch.tensor([2, 99, 4, 99], dtype=torch.int32)[::2]
    strided = RotationTable(t.direct[::2, :8], t.cross.T.contiguous().T[::2, :8], sizes)
    slots = torch.tensor([[0, 9], [1, 9], [-1, 9]])[:, 0]
    x = values(3, 8)
    assert_same_bits(rotate(x, strided, slots), one_by_one(x, strided, slots), "rows")


def test_a_rotation_of_everything_uses_slot_0_and_its_size() -> None:
    t, x = table(2, 8, torch.tensor([8, 2], dtype=torch.int32)), values(3, 8)
    assert_same_bits(rotate(x, t, None), one_by_one(x, t, torch.zeros(3, dtype=torch.int64)), "rows")


def changed(**changes: object) -> RotationTable:
    t = table()
    return RotationTable(**{"direct": t.direct, "cross": t.cross, "group_sizes": t.group_sizes, **changes})


INT32 = torch.int32
ODD_SIZE = torch.tensor([2, 3], dtype=INT32)
REFUSED = {
    "width": (changed(), values(3, 10), None, AdapterError, "wanted x"),
    "no dimension": (changed(), torch.tensor(1.0), None, AdapterError, "wanted x"),
    "tables of two shapes": (changed(cross=values(2, 4)), values(3, 8), None, AdapterError, "same D"),
    "a table of one dimension": (changed(direct=values(8), cross=values(8)), values(3, 8), None, AdapterError, r"\[S, D\]"),
    "no slot": (changed(direct=values(0, 8), cross=values(0, 8)), values(3, 8), None, AdapterError, "at least one slot"),
    "tables of two dtypes": (changed(cross=values(2, 8).bfloat16()), values(3, 8), None, AdapterError, "one dtype"),
    "another device": (changed(direct=values(2, 8).to("meta")), values(3, 8), None, AdapterError, "one device"),
    "an odd group size": (changed(group_sizes=3), values(3, 8), None, ConfigError, "divisible by 2"),
    "a group size too large": (changed(group_sizes=16), values(3, 8), None, ConfigError, "try group_size=8"),
    "sizes of another dtype": (changed(group_sizes=torch.tensor([2, 4])), values(3, 8), None, AdapterError, "int32"),
    "too many sizes": (changed(group_sizes=torch.ones(3, dtype=INT32)), values(3, 8), None, AdapterError, r"int32 \[2\]"),
    "slots of another dtype": (changed(), values(3, 8), torch.zeros(3, dtype=INT32), RoutingError, "int64"),
    "too few slots": (changed(), values(3, 8), torch.zeros(2, dtype=torch.int64), RoutingError, "first dimensions"),
    "one slot": (changed(), values(3, 8), torch.tensor(0), RoutingError, "first dimensions"),
    "a slot for each element": (changed(), values(3, 8), torch.zeros(3, 8, dtype=torch.int64), RoutingError, "each token"),
    "slots elsewhere": (changed(), values(3, 8), torch.zeros(3, dtype=torch.int64, device="meta"), RoutingError, "device"),
    "a slot too high": (changed(), values(3, 8), torch.tensor([0, 2, 1]), KernelError, "slot"),
    "a slot too low": (changed(), values(3, 8), torch.tensor([0, -2, 1]), KernelError, "slot"),
    "an odd size": (changed(group_sizes=ODD_SIZE), values(3, 8), torch.tensor([0, 1, 0]), KernelError, "group size"),
    "whole numbers": (changed(), torch.ones(3, 8, dtype=torch.int64), None, KernelError, "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str, implementation: str | None) -> None:
    t, x, slots, error, why = REFUSED[what]
    before = x.clone()
    for function in (rotate, rotate_):
        with using(implementation or "eager") if implementation else torch.no_grad(), pytest.raises(error, match=why):
            function(x, t, slots)
    assert torch.equal(x, before)


def test_a_table_is_not_taken_for_a_rotation() -> None:
    with pytest.raises(AdapterError, match="make a RotationTable"):
        rotate(values(3, 8), Rotation(values(2, 8), values(2, 8), 4))


def test_keep_is_one_of_two_words() -> None:
    assert torch.equal(rotate(values(3, 8), table(), None, keep=Keep.OUTPUT), rotate(values(3, 8), table(), None))
    with pytest.raises(ConfigError, match="'input' or 'output'"):
        rotate(values(3, 8), table(), None, keep="both")


@pytest.mark.parametrize("which", ["x", "direct", "cross"])
def test_in_place_refuses_to_lose_a_gradient(which: str) -> None:
    t, x = table(), values(3, 8)
    {"x": x, "direct": t.direct, "cross": t.cross}[which].requires_grad_()
    before = x.detach().clone()
    with pytest.raises(AdapterError, match="use rotate"):
        rotate_(x, t, None)
    assert_same_bits(x.detach(), before, "x")
    with torch.no_grad():
        wanted = rotate(x, t, None)
        assert_same_bits(rotate_(x, t, None).detach(), wanted, "without gradient")


def test_autograd_sees_that_what_it_saved_was_changed_in_place() -> None:
    x = values(3, 8).requires_grad_()
    z = x.sigmoid()  # which keeps its output
    with torch.no_grad():
        rotate_(z, table(), None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = values(3, 8)
        wanted = rotate(x, table(), None)
        assert torch.equal(rotate_(x, table(), None), wanted)


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("slots", [None, (0, -1, 1)])
@pytest.mark.parametrize("function", [rotate, rotate_])
@pytest.mark.parametrize("gradient", [False, True])
def test_tensors_without_memory(device: str, slots: tuple[int, ...] | None, function, gradient: bool) -> None:
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x, direct, cross = torch.empty(3, 5, 8, dtype=torch.bfloat16), torch.empty(2, 8), torch.empty(2, 8)
        routed = None if slots is None else torch.empty(3, dtype=torch.int64)
        if gradient and function is rotate:
            direct.requires_grad_()
        z = function(x, RotationTable(direct, cross, 4), routed)
        assert (z.shape, z.dtype, z.device) == (x.shape, x.dtype, x.device)
        if z.requires_grad:
            z.sum().backward()
            assert direct.grad.shape == direct.shape


@pytest.mark.parametrize("keep", ["input", "output"])
def test_what_torch_func_computes(keep: str) -> None:
    t, x = table(1), values(5, 3, 8)
    wanted = rotate(x, t, None)
    mapped = torch.vmap(lambda row: rotate(row, t, None, keep=keep))(x)
    assert_same_bits(mapped, wanted, "vmap")

    def of(direct: Tensor) -> Tensor:
        return rotate(x, RotationTable(direct, t.cross, 4), None, keep=keep)

    value, tangent = torch.func.jvp(of, (t.direct,), (torch.ones_like(t.direct),))
    assert_same_bits(value, wanted, "jvp")
    assert_same_bits(tangent, x, "tangent: x times ones")
    with torch.autograd.forward_ad.dual_level():
        dual = of(torch.autograd.forward_ad.make_dual(t.direct, torch.ones_like(t.direct)))
        assert_same_bits(torch.autograd.forward_ad.unpack_dual(dual).tangent, x, "tangent of a dual number")


@pytest.mark.parametrize("name", cases.CPU_AND_EAGER)
def test_a_singular_slot_that_no_row_uses_gets_a_gradient_of_zero(name: str) -> None:
    direct = torch.tensor([[1.0] * 8, [0.0] * 8], requires_grad=True)
    cross = torch.zeros(2, 8, requires_grad=True)
    table = RotationTable(direct, cross, 4)
    with using(name):
        z = rotate(torch.ones(3, 8), table, torch.tensor([0, -1, 0]), keep="output")
        gradients = torch.autograd.grad(z.sum(), (direct, cross))
    for gradient in gradients:
        assert gradient[0].any()
        assert not gradient[1].any()
