"""The operations as torch sees them: gradients, what is kept for backward, compilers, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels import cases
from tests.laws.bounds import assert_within
from tests.versions import needs_a_compiler_that_recomputes_copies
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from roadie.errors import InPlaceError, KernelError
from roadie.kernels import RotationTable, rotate, using
from roadie.rotation import Rotation, to_blocks
from roadie.testing.accuracy import assert_same_bits, unit_roundoff

KEEPS = ("input", "output", "copy")
SLOTS = {
    "all rows": None,
    "rows": torch.tensor([1, -1, 0, 1]),
    "tokens": torch.tensor([[0, 1, -1], [2, 2, 0], [-1, -1, -1], [0, 0, 1]]),
}
SIZES = {"one size": 4, "sizes": torch.tensor([2, 6, 12], dtype=torch.int32)}


def condition_number(rotation: Rotation) -> float:
    """Largest over smallest singular value of the worst block (1 for every road_1 rotation; inf if singular)."""
    dense = to_blocks(rotation).double()
    values = torch.linalg.svdvals(dense)
    ratio = values[..., 0] / values[..., 1]
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(
    dtype: torch.dtype, table_dtype: torch.dtype | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[4, 3, 12]`` and tables ``[3, 12]`` with blocks that are far from singular."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 12, generator=generator, dtype=torch.float64)
    direct = 1 + 0.2 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    cross = 0.4 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    table = (tensor.to(table_dtype or dtype).requires_grad_() for tensor in (direct, cross))
    return x.to(dtype).requires_grad_(), *table


def gradients(
    keep: str, slots: Tensor | None, sizes: int | Tensor, tensors: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    x, direct, cross = tensors
    z = rotate(x, RotationTable(direct, cross, sizes), slots, keep=keep)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).to(z.dtype)
    return torch.autograd.grad((z * weight).sum(), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradcheck(keep: str, slots: str, sizes: str) -> None:
    def function(x: Tensor, direct: Tensor, cross: Tensor) -> Tensor:
        return rotate(x, RotationTable(direct, cross, SIZES[sizes]), SLOTS[slots], keep=keep)

    def operation(x: Tensor, direct: Tensor, cross: Tensor) -> Tensor:
        uniform = isinstance(SIZES[sizes], int)
        size = (None, SIZES[sizes]) if uniform else (SIZES[sizes], 0)
        return torch.ops.roadie.rotate_rows(x, direct, cross, SLOTS[slots], *size, keep != "input")

    assert torch.autograd.gradcheck(function, leaves(torch.float64))
    assert torch.autograd.gradcheck(operation, leaves(torch.float64))


@pytest.mark.parametrize("implementation", cases.CPU_AND_EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_the_truth_within_rounding(
    implementation: str, dtype: torch.dtype, keep: str, slots: str, sizes: str
) -> None:
    tensors = leaves(dtype, torch.float32)
    with using(implementation):
        found = gradients(keep, SLOTS[slots], SIZES[sizes], tensors)
    check_gradients(found, tensors, SLOTS[slots], SIZES[sizes], kept_output=keep != "input")


def check_gradients(
    found: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    slots: Tensor | None,
    sizes: int | Tensor,
    *,
    kept_output: bool,
) -> None:
    """Against autograd through R written out in float64: sums of 12 products; a kept output is off by its own rounding."""
    truth = true_gradients(tensors, slots, sizes)
    size = true_gradients(tuple(tensor.abs() for tensor in tensors), slots, sizes, absolute=True)
    x, direct, cross = tensors
    reach = 16 * unit_roundoff(torch.float32)
    if kept_output:
        uniform = sizes if isinstance(sizes, int) else None
        worst = max(
            condition_number(Rotation(d, c, uniform or int(sizes[s])))
            for s, (d, c) in enumerate(zip(direct, cross, strict=True))
        )
        # M = N R^-T mixes the two sums of a pair, and an error of a kept output grows by the condition number.
        reach = (reach + 2 * unit_roundoff(x.dtype)) * worst**2
        size = size[0], *(pair_sums(s, sizes) for s in size[1:])
    for value, exact, bound, what in zip(found[1:], truth[1:], size[1:], ("direct", "cross"), strict=True):
        assert value.dtype == torch.float32
        assert_within(value, exact, reach * bound + 1e-30, f"gradient of {what}")
    assert found[0].dtype == x.dtype
    assert_within(found[0], truth[0], (reach / 4 + 2 * unit_roundoff(x.dtype)) * size[0] + 1e-30, "gradient of x")


def pair_sums(values: Tensor, sizes: int | Tensor) -> Tensor:
    """For each output what it and its partner have together, in all slots' sizes: the whole row is a bound for that."""
    return values.sum(-1, keepdim=True).expand_as(values)


def true_gradients(
    tensors: tuple[Tensor, ...], slots: Tensor | None, sizes: int | Tensor, *, absolute: bool = False
) -> tuple[Tensor, ...]:
    """By autograd through dense matrices; absolute: of the absolute values of everything, which bounds rounding."""
    x, direct, cross = (tensor.detach().double().requires_grad_() for tensor in tensors)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(tensors[0].dtype).double()
    rows = (
        [0] * 12
        if slots is None
        else slots.expand(4, 3).flatten().tolist()
        if slots.dim() == 2
        else slots.repeat_interleave(3).tolist()
    )
    uniform = isinstance(sizes, int)
    matrices = cases.dense_of_slots(
        cases.RowRotations(direct, cross, None, 1, None if uniform else sizes, sizes if uniform else 0)
    )
    matrices, weight = (matrices.abs(), weight.abs()) if absolute else (matrices, weight)
    z = torch.stack([matrices[slot] @ row for slot, row in zip(rows, x.view(12, 12), strict=True)]).view_as(x)
    return torch.autograd.grad((z * weight).sum(), (x, direct, cross))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_opcheck(dtype: torch.dtype, slots: str, sizes: str) -> None:
    x, direct, cross = leaves(dtype, torch.float32)
    size = (None, 4) if sizes == "one size" else (SIZES[sizes], 0)
    for keep_output in (False, True):
        torch.library.opcheck(torch.ops.roadie.rotate_rows, (x, direct, cross, SLOTS[slots], *size, keep_output))
    still = (x.detach(), x.detach(), direct.detach(), cross.detach(), SLOTS[slots], *size)
    for want_x in (True, False):
        torch.library.opcheck(torch.ops.roadie.rotate_rows_backward, (*still, want_x))
    torch.library.opcheck(torch.ops.roadie.rotate_rows_backward, (still[0], None, *still[2:], True))


def kept_of_size(x: Tensor, function) -> tuple[Tensor, list[int]]:
    """The result, and the addresses of the saved tensors that are as large as x."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        z = function()
    return z, [tensor.untyped_storage().data_ptr() for tensor in saved if tensor.numel() >= x.numel()]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_a_compiler_that_recomputes_copies)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_one_tensor_is_kept(keep: str, dtype: torch.dtype, compiled: bool) -> None:
    x, direct, cross = leaves(dtype, torch.float32)
    x = (x * 1).detach().repeat(8, 1, 1).requires_grad_()
    rotation = torch.compile(rotate, backend="aot_eager", fullgraph=True) if compiled else rotate
    z, kept = kept_of_size(x, lambda: rotation(x, RotationTable(direct, cross, 4), None, keep=keep))
    assert kept == [(x if keep == "input" else z).untyped_storage().data_ptr()]


@pytest.mark.parametrize("keep", KEEPS)
def test_nothing_is_kept_where_the_table_needs_no_gradient(keep: str) -> None:
    x, direct, cross = leaves(torch.float32)
    x = x.detach().repeat(8, 1, 1).requires_grad_()
    t = RotationTable(direct.detach(), cross.detach(), 4)
    z, kept = kept_of_size(x, lambda: rotate(x, t, None, keep=keep))
    assert kept == []
    wanted = torch.autograd.grad(rotate(x, RotationTable(direct, cross, 4), None).sum(), x)[0]
    assert_same_bits(torch.autograd.grad(z.sum(), x)[0], wanted, "gradient of x")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("keep", KEEPS)
def test_each_gradient_alone(keep: str, which: int) -> None:
    wanted = gradients(keep, None, 4, leaves(torch.float32))[which]
    tensors = [t.detach().requires_grad_(i == which) for i, t in enumerate(leaves(torch.float32))]
    z = rotate(tensors[0], RotationTable(tensors[1], tensors[2], 4), None, keep=keep)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (z * weight).sum().backward()
    assert_same_bits(tensors[which].grad, wanted, "gradient")
    assert [t.grad is not None for t in tensors] == [i == which for i in range(3)]


def test_no_rows_no_gradient() -> None:
    x, direct, cross = torch.empty(0, 12, requires_grad=True), *leaves(torch.float32)[1:]
    rotate(x, RotationTable(direct, cross, 4), None).sum().backward()
    assert x.grad.shape == (0, 12)
    assert torch.equal(direct.grad, torch.zeros(3, 12))
    assert torch.equal(cross.grad, torch.zeros(3, 12))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("slots", ["all rows", "rows"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.slow
def test_compiled_is_eager(backend: str, slots: str, keep: str) -> None:
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(x: Tensor, direct: Tensor, cross: Tensor, routed: Tensor | None) -> Tensor:
        return rotate(x, RotationTable(direct, cross, 4), routed, keep=keep)

    routed = [SLOTS[slots]] if SLOTS[slots] is None else [SLOTS[slots], torch.tensor([0, 2, 2, -1])]
    for values in routed:
        tensors = leaves(torch.float32)
        z = compiled(*tensors, values)
        wanted = rotate(tensors[0], RotationTable(*tensors[1:], 4), values, keep=keep)
        assert_same_bits(z, wanted, "z")
        weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        found = torch.autograd.grad((z * weight).sum(), tensors)
        check_gradients(found, tensors, values, 4, kept_output=keep != "input")
    assert counter.frame_count == 1, "compiled again for other values of the slots"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_activation_checkpoints(keep: str, reentrant: bool) -> None:
    tensors = leaves(torch.float32)
    wanted = gradients(keep, SLOTS["rows"], 4, tensors)

    def function(x: Tensor) -> Tensor:
        return rotate(x, RotationTable(*tensors[1:], 4), SLOTS["rows"], keep=keep)

    z = checkpoint(function, tensors[0], use_reentrant=reentrant)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (z * weight).sum().backward()
    for tensor, expected in zip(tensors, wanted, strict=True):
        assert_same_bits(tensor.grad, expected, "gradient")


@pytest.mark.parametrize("keep", KEEPS)
def test_autocast_changes_nothing(keep: str) -> None:
    tensors = leaves(torch.float32)
    wanted = gradients(keep, None, 4, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert rotate(tensors[0], RotationTable(*tensors[1:], 4), None).dtype == torch.float32
        found = gradients(keep, None, 4, tensors)
    for value, expected in zip(found, wanted, strict=True):
        assert_same_bits(value, expected, "gradient")


@pytest.mark.parametrize("by", ["door", "operation"])
def test_an_output_changed_in_place_is_noticed(by: str) -> None:
    x, direct, cross = leaves(torch.float32)

    def rotated(keep: str) -> Tensor:
        if by == "door":
            return rotate(x, RotationTable(direct, cross, 4), None, keep=keep)
        return torch.ops.roadie.rotate_rows(x, direct, cross, None, None, 4, keep != "input")

    with pytest.raises(InPlaceError, match="set_kept_for_backward"):
        rotated("output").relu_().sum().backward()
    rotated("input").relu_().sum().backward()
    found = direct.grad
    wanted = torch.autograd.grad(rotated("input").relu().sum(), direct)[0]
    assert_same_bits(found, wanted, "gradient with the input kept")


def test_an_input_changed_in_place_is_noticed() -> None:
    x, direct, cross = leaves(torch.float32)
    h = x * 1
    z = rotate(h, RotationTable(direct, cross, 4), None, keep="input")
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
        z.sum().backward()
    assert not isinstance(raised.value, InPlaceError)


@pytest.mark.parametrize("needed", [(0, 1, 2), (0,), (1, 2)])
@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_second_derivative_of_the_operation_is_refused(keep: str, power: int, needed: tuple[int, ...]) -> None:
    tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(leaves(torch.float32))]
    x, direct, cross = tensors
    z = torch.ops.roadie.rotate_rows(x, direct, cross, None, None, 4, keep != "input")
    wanted = [tensors[i] for i in needed]
    first = torch.autograd.grad((z**power).sum(), wanted, create_graph=True)
    if not any(gradient.requires_grad for gradient in first):
        assert (power, needed) == (1, (0,)), "R^T 1 depends on nothing that needs a gradient"
        return
    with pytest.raises(KernelError, match="second derivative"):
        torch.autograd.grad(sum((g**2).sum() for g in first), wanted, allow_unused=True)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, torch.tensor([-1, 2, 0]), torch.tensor([[2, 2], [-1, 1], [0, 2]])], ids=str)
@pytest.mark.parametrize("sizes", [4, torch.tensor([2, 4, 12], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_second_derivatives_of_the_door(keep: str, sizes: Any, slots: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, direct, cross = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 2, 12), (3, 12), (3, 12))
    )
    inputs = [x.requires_grad_(), (direct.abs() + 1).requires_grad_(), cross.requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda x, d, c: rotate(x, RotationTable(d, c, sizes), slots, keep=keep), inputs)
