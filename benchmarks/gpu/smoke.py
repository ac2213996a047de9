"""Is every kernel right on this device, in every dtype: against R in float64, within what rounding can do.

On a CPU the kernels run in Triton's interpreter, which cuts digits off where a GPU rounds: twice the bound there.

Legend: T rows, D out features, S slots, G group size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Entry, Setting
from roadie.kernels import RotationTable, RowRotations, prepare_rotation, rotate, using
from roadie.kernels.triton import TritonImplementation
from roadie.testing.accuracy import assert_as_accurate_as, assert_same_bits, smallest_step, unit_roundoff

TRITON = TritonImplementation()
SLOTS = 5
U32 = unit_roundoff(torch.float32)
ROOM = 1.01  # the bounds themselves are made in float64, and leave out products of roundings


def rotation(
    setting: Setting,
    width: int,
    group_size: int,
    dtype: str,
    route: str,
    rows: tuple[int, ...],
    padding: int = 0,
    table_dtype: str = "float32",
) -> list[Entry]:
    """R x, also in place, R^T g with the sums over rows, and the gradients of the table; the same in every run."""
    make = _Random(setting)
    kind, of_table = getattr(torch, dtype), getattr(torch, table_dtype)
    worst: dict[str, float] = {}
    for count in rows:
        turns = make.turns(width, group_size, route, count, of_table)
        x, grad, kept = (make(count, width + padding).to(kind)[:, :width] for _ in range(3))
        _forward(x, turns, worst)
        _backward(grad, kept, turns, worst)
    wrong = {what: error for what, error in worst.items() if not error <= 1}
    assert not wrong, f"errors of so many times what rounding can do: {wrong}"
    return [{"workload": "kernels", "worst": worst}]


class _Random:
    """Equal numbers for equal questions, on the device."""

    def __init__(self, setting: Setting) -> None:
        if setting.device == "cpu":
            _let_loops_be_interpreted()
        self.device = setting.device
        self.generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def slots(self, count: int) -> Tensor:
        return torch.randint(-1, SLOTS, (count,), generator=self.generator, device=self.device)

    def turns(self, width: int, group_size: int, route: str, rows: int, dtype: torch.dtype) -> RowRotations:
        """route: "one" rotation of all rows; "rows" with a slot each; "repeat": slots of several; "sizes": a size a slot."""
        table = [self(1 if route == "one" else SLOTS, width).to(dtype) for _ in range(2)]
        if route == "one":
            return RowRotations(*table, None, 1, None, group_size)
        repeat = next(n for n in (3, 7, 2, 1) if rows % n == 0) if route == "repeat" else 1
        powers = [2**power for power in range(1, SLOTS + 1)]
        sizes = torch.tensor(powers, dtype=torch.int32, device=self.device) if route == "sizes" else None
        return RowRotations(*table, self.slots(rows // repeat), repeat, sizes, group_size)


def _forward(x: Tensor, turns: RowRotations, worst: dict[str, float]) -> None:
    z = _nan_like(x)
    TRITON.rotate(x, z, turns)
    truth, reach = _turned(x, turns), _turned(x, turns, absolute=True)
    _note(worst, "z", z, truth, _bound(reach, truth, x.dtype))
    again = _nan_like(x).copy_(x)
    TRITON.rotate(again, again, turns)
    assert_same_bits(again, z, "in place")


def _backward(grad: Tensor, kept: Tensor, turns: RowRotations, worst: dict[str, float]) -> None:
    first, second = _sums(grad, kept, turns), _sums(grad, kept, turns)
    for one, other, what in zip(first, second, ("grad_x", "own", "partner"), strict=True):
        assert_same_bits(one, other, f"{what}, again")
    alone = _nan_like(grad)
    TRITON.backward(grad, None, alone, turns, None, None)
    assert_same_bits(alone, first[0], "grad_x without sums")
    truth, reach = (_turned(grad, turns, transposed=True, absolute=absolute) for absolute in (False, True))
    _note(worst, "grad_x", first[0], truth, _bound(reach, truth, grad.dtype))
    partners = kept.double().gather(1, _partners(grad, turns)[0])
    for what, value, other in (("own", first[1], kept.double()), ("partner", first[2], partners)):
        terms = grad.double() * other
        size = (len(grad) + 1) * U32 * _by_slot(terms.abs(), turns)
        _note(worst, what, value, _by_slot(terms, turns), size * ROOM + smallest_step(torch.float32))


def _sums(grad: Tensor, kept: Tensor, turns: RowRotations) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = _nan_like(grad)
    own, partner = (torch.full(turns.direct.shape, math.nan, device=grad.device) for _ in range(2))
    TRITON.backward(grad, kept, grad_x, turns, own, partner)
    return grad_x, own, partner


def _nan_like(x: Tensor) -> Tensor:
    """Memory with x's strides in which nothing has been written."""
    return torch.full((len(x), x.stride(0)), math.nan, dtype=x.dtype, device=x.device)[:, : x.shape[1]]


def _slot_of_rows(x: Tensor, turns: RowRotations) -> Tensor:
    if turns.slots is None:
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return turns.slots.repeat_interleave(turns.repeat)


def _partners(x: Tensor, turns: RowRotations) -> tuple[Tensor, Tensor]:
    """For each element ``[T, D]`` the column of its partner, and +1 where it is the first of its pair, else -1."""
    column = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    used = _slot_of_rows(x, turns).clamp(min=0)
    size = torch.full_like(used, turns.group_size) if turns.sizes is None else turns.sizes[used].long()
    half = size[:, None] // 2
    is_first = column % size[:, None] < half
    return torch.where(is_first, column + half, column - half), torch.where(is_first, 1.0, -1.0).double()


def _turned(x: Tensor, turns: RowRotations, *, transposed: bool = False, absolute: bool = False) -> Tensor:
    """R x or R^T x in float64; absolute: of ``|R|`` and ``|x|``, which rounding errors are relative to."""
    partner, sign = _partners(x, turns)
    slots, x = _slot_of_rows(x, turns), x.double()
    direct, cross = (table.double()[slots.clamp(min=0)] for table in (turns.direct, turns.cross))
    if absolute:
        x, direct, cross, sign = x.abs(), direct.abs(), cross.abs(), -torch.ones_like(sign)
        sign = -sign if transposed else sign
    other = x.gather(1, partner)
    crossed = sign * cross.gather(1, partner) * other if transposed else -sign * cross * other
    return torch.where((slots < 0)[:, None], x, direct * x + crossed)


def _bound(reach: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Two roundings of what is computed in, and one to the dtype."""
    last = 0.0
    if dtype != torch.float32:
        roundings = 2 if truth.device.type == "cpu" else 1
        last = roundings * (unit_roundoff(dtype) * truth.abs() + smallest_step(dtype) / 2)
    return (2 * U32 * reach + last) * ROOM + smallest_step(torch.float32)


def _by_slot(terms: Tensor, turns: RowRotations) -> Tensor:
    """The sum of ``[T, D]`` over the rows of each slot: ``[S, D]``."""
    sums = torch.zeros(len(turns.direct) + 1, terms.shape[1], dtype=torch.float64, device=terms.device)
    return sums.index_add_(0, _slot_of_rows(terms, turns) + 1, terms)[1:]


def _note(worst: dict[str, float], what: str, value: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Keep the largest error, as a multiple of its bound; what is not a number counts as infinite."""
    error = ((value.double() - truth).abs() / bound).nan_to_num(math.inf, math.inf, math.inf)
    worst[what] = max(worst.get(what, 0.0), float(error.max()) if error.numel() else 0.0)


def prepared(setting: Setting, dtype: str, width: int) -> list[Entry]:
    """A rotation that is ready to be launched gives what the one that is not gives, for other rows too."""
    make = _Random(setting)
    table = RotationTable(make(SLOTS, width), make(SLOTS, width), 64 if width % 64 == 0 else 2)
    for slots in (None, make.slots(7)):
        y = make(7, 3, width).to(getattr(torch, dtype))
        call = prepare_rotation(y, table, slots)
        if setting.device == "cpu":
            continue  # there another implementation prepares, which other tests are about
        assert call is not None, "nothing is prepared on this device"
        for _ in range(3):
            y = make(7, 3, width).to(y.dtype)
            wanted = rotate(y, table, slots)
            assert call(y), "it refused a tensor like the one that it was prepared for"
            assert_same_bits(y, wanted, "prepared")
    return [{"workload": "kernels"}]


def gradients(setting: Setting, dtype: str, keep: str, width: int) -> list[Entry]:
    """Through autograd: x, direct and cross have gradients about as near to the truth as plain operations have.

    Rounding is held to its bounds in `rotation`; here sums and what is solved for may be in another order.
    """
    make = _Random(setting)
    # Far from singular, as adapters are: from an output its input is made again.
    table = 1 + 0.1 * make(SLOTS, width), 0.3 * make(SLOTS, width)
    tensors = [make(7, 5, width).to(getattr(torch, dtype)), *table]
    slots, weights = make.slots(7), make(7, 5, width)

    def of(device: str, kind: Callable[[Tensor], Tensor], name: str | None) -> list[Tensor]:
        x, direct, cross = (kind(tensor).to(device).clone().requires_grad_() for tensor in tensors)
        with nullcontext() if name is None else using(name):
            z = rotate(x, RotationTable(direct, cross, 8), slots.to(device), keep=keep)
            loss = (z.to(torch.promote_types(z.dtype, torch.float32)) * weights.to(device)).sum()
            return [gradient.cpu() for gradient in torch.autograd.grad(loss, (x, direct, cross))]

    found = of(setting.device, lambda tensor: tensor, "triton" if setting.device == "cpu" else None)
    plain, truth = (of("cpu", kind, "eager") for kind in (lambda tensor: tensor, Tensor.double))
    for value, rival, exact in zip(found, plain, truth, strict=True):
        assert_as_accurate_as(value, rival, exact, slack=4)
    return [{"workload": "kernels"}]


def product(setting: Setting, dtype: str, width: int) -> list[Entry]:
    """The matrix product that rotates its result: every tile that can be chosen."""
    from roadie.kernels.triton.matmul import linear_rotate

    make, kind, depth = _Random(setting), getattr(torch, dtype), width // 2
    worst: dict[str, float] = {}
    for rows in (1, 100, 300):
        x, weight = make(rows, depth).to(kind), make(width, depth).to(kind)
        turns = make.turns(width, 64 if width % 64 == 0 else 2, "rows", rows, torch.float32)
        z = linear_rotate(x, weight, None, turns)
        truth = _turned(x.double() @ weight.double().T, turns)
        reach = _turned(x.double().abs() @ weight.double().abs().T, turns, absolute=True)
        _note(
            worst,
            "z",
            z,
            truth,
            (depth + 4) / 2 * _bound(reach, truth * 0, torch.float32) + _bound(reach * 0, truth, kind),
        )
    assert worst["z"] <= 1, f"an error of {worst['z']:.3g} times what rounding can do"
    return [{"workload": "kernels", "worst": worst}]


def _let_loops_be_interpreted() -> None:
    """Before 3.7 Triton's interpreter makes bounds of loops by int() of an array of one element, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    usual = interpreter._patch_lang_tensor
    if hasattr(usual, "usual"):
        return

    def patch(tensor: Any, scope: Any) -> None:
        usual(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.usual = usual
    interpreter._patch_lang_tensor = patch
