"""Triton's kernels on a GPU: the checks of tests/kernels with the rounding of half precision, sizes of real layers, graphs.

    TRITON_INTERPRET=0 python -m pytest tests/gpu

The other tests ask for Triton's interpreter, and a process has either.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or HIP device", allow_module_level=True)

from tests.kernels import cases
from tests.kernels.test_triton import CHECKS, SHAPES, check_both_at_once
from tests.kernels.test_triton_matmul import LAYERS, layer, reach_of, truth_of

from roadie.kernels.contract import SUMS, Implementation, RowRotations
from roadie.kernels.eager import EagerImplementation
from roadie.kernels.triton import TritonImplementation, runtime
from roadie.kernels.triton.matmul import linear_rotate
from roadie.testing.accuracy import assert_as_accurate_as, assert_same_bits, relative_error, unit_roundoff

if runtime.is_interpreted():
    pytest.skip("Triton interprets in this process; run TRITON_INTERPRET=0 pytest tests/gpu", allow_module_level=True)

GPU = torch.device("cuda")
TRITON, EAGER = TritonImplementation(), EagerImplementation()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTES = ("one rotation", "rows", "sizes")


def on_gpu(turns: RowRotations) -> RowRotations:
    return RowRotations(*(value.to(GPU) if isinstance(value, Tensor) else value for value in turns))


def moved(x: Tensor) -> Tensor:
    """x with its strides on the GPU."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU).copy_(x)


class Elsewhere(Implementation):
    """The kernels on the GPU for tensors on the CPU, so that the checks can be those of every implementation."""

    name = "triton on a GPU"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        return TRITON.refusal(GPU, dtype, table_dtype)

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        there = moved(x)
        result = there if out.data_ptr() == x.data_ptr() else moved(out)
        TRITON.rotate(there, result, on_gpu(turns))
        out.copy_(result)

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
        solve: int = SUMS,
    ) -> None:
        there = [None if tensor is None else moved(tensor) for tensor in (grad, kept, grad_x, own, partner)]
        TRITON.backward(*there[:3], on_gpu(turns), *there[3:], solve)
        for here, result in zip((grad_x, own, partner), there[2:], strict=True):
            if here is not None:
                here.copy_(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_it_is_the_truth_within_rounding(check: Callable, shape: str, dtype: torch.dtype) -> None:
    check(Elsewhere(), cases.batch(**SHAPES[shape], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_turns_as_the_reference_does_bit_for_bit(shape: str, dtype: torch.dtype) -> None:
    cases.check_same_bits(Elsewhere(), EAGER, cases.batch(**SHAPES[shape], dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_made_in_the_launches_that_sum(shape: str) -> None:
    check_both_at_once(Elsewhere(), cases.batch(**SHAPES[shape]))


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from((2, 4, 6, 8, 10, 12, 20, 24, 40, 60, 120)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_any_shape(sizes: list[int], uniform: bool, dtype: torch.dtype, data: st.DataObject) -> None:
    slots = data.draw(st.none() | st.lists(st.integers(-1, len(sizes) - 1), max_size=40))
    repeat = 1 if slots is None else data.draw(st.integers(1, 9))
    rows = data.draw(st.integers(0, 80)) if slots is None else len(slots) * repeat
    b = cases.batch(
        rows, 120, sizes[0] if uniform else sizes, num_slots=len(sizes), slots=slots, repeat=repeat, dtype=dtype,
        padding=data.draw(st.integers(0, 9)), table_dtype=data.draw(st.sampled_from((torch.float32, dtype))),
    )  # fmt: skip
    for check in CHECKS:
        check(Elsewhere(), b)


def layer_sized(rows: int, width: int, route: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, RowRotations]:
    """x, gradient, kept ``[rows, width]`` and the rotations of 8 adapters, all on the GPU."""
    generator = torch.Generator(GPU).manual_seed(0)
    x, gradient, kept = (torch.randn(rows, width, generator=generator, device=GPU).to(dtype) for _ in range(3))
    direct, cross = (torch.randn(8, width, generator=generator, device=GPU) for _ in range(2))
    slots = None if route == "one rotation" else torch.randint(-1, 8, (rows,), generator=generator, device=GPU)
    sizes = torch.tensor([2, 4, 8, 16, 32, 64, 128, 256], dtype=torch.int32, device=GPU) if route == "sizes" else None
    return x, gradient, kept, RowRotations(direct, cross, slots, 1, sizes, 64)


def backward_of(
    implementation: Implementation, gradient: Tensor, kept: Tensor, turns: RowRotations
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.full_like(gradient, torch.nan)
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    own, partner = (torch.full(turns.direct.shape, torch.nan, dtype=wide, device=GPU) for _ in range(2))
    implementation.backward(gradient, kept, grad_x, turns, own, partner)
    return grad_x, own, partner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (513, 11008), (9000, 4096)])
def test_layers_of_real_size(rows: int, width: int, route: str, dtype: torch.dtype) -> None:
    """As the reference bit for bit, also in place; sums as accurate as its own, and the same in every run."""
    if route == "sizes" and width % 512:
        width = 11264
    x, gradient, kept, turns = layer_sized(rows, width, route, dtype)
    out, wanted = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    TRITON.rotate(x, out, turns)
    EAGER.rotate(x, wanted, turns)
    assert_same_bits(out, wanted, "z")
    TRITON.rotate(x, x, turns)
    assert_same_bits(x, wanted, "in place")
    value, rival = (backward_of(implementation, gradient, kept, turns) for implementation in (TRITON, EAGER))
    assert_same_bits(value[0], rival[0], "grad_x")
    wide = turns._replace(direct=turns.direct.double(), cross=turns.cross.double())
    truth = backward_of(EAGER, gradient.double(), kept.double(), wide)
    for one, other, exact in zip(value, rival, truth, strict=True):
        assert_as_accurate_as(one, other, exact)
    for again, first in zip(backward_of(TRITON, gradient, kept, turns), value, strict=True):
        assert_same_bits(again, first, "again")


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements: the last rows are right, forward and backward."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    rows, width = (1 << 19) + 5, 4096
    x = torch.zeros(rows, width, dtype=torch.float16, device=GPU)
    x[-5:] = torch.randn(5, width, device=GPU)
    turns = layer_sized(1, width, "one rotation", torch.float16)[3]
    tail, wanted = x[-5:].clone(), torch.empty(5, width, dtype=torch.float16, device=GPU)
    EAGER.rotate(tail, wanted, turns)
    grad_x, own, _ = backward_of(TRITON, x, x, turns)
    small = backward_of(EAGER, tail, tail, turns)
    assert_same_bits(grad_x[-5:].clone(), small[0], "grad_x")
    assert relative_error(own, small[1].double()) < 5 * unit_roundoff(torch.float32)
    del grad_x
    TRITON.rotate(x, x, turns)
    assert_same_bits(x[-5:].clone(), wanted, "z")


@pytest.mark.parametrize("route", ROUTES)
def test_a_graph_replays_with_other_rows_and_slots(route: str) -> None:
    """Captured once, forward, backward and sums follow what is in the tensors when the graph is replayed."""
    x, gradient, kept, turns = layer_sized(300, 4096, route, torch.bfloat16)
    out = torch.full_like(x, torch.nan)
    results: list[Tensor] = []

    def step() -> None:
        TRITON.rotate(x, out, turns)
        results[:] = [out, *backward_of(TRITON, gradient, kept, turns)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor in (x, gradient, kept):
        tensor.copy_(torch.randn_like(tensor))
    if turns.slots is not None:
        turns.slots.copy_(torch.randint_like(turns.slots, 9) - 1)
        turns.slots[:200] = 3
    graph.replay()
    replayed = [result.clone() for result in results]
    step()
    for again, now, what in zip(replayed, results, ("z", "grad_x", "own", "partner"), strict=True):
        assert_same_bits(again, now, what)
        assert now.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_product_rotated(name: str, dtype: torch.dtype) -> None:
    check_product(*layer(**LAYERS[name], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 100, 600])
def test_the_product_of_a_layer(rows: int, dtype: torch.dtype) -> None:
    """Every tile that can be chosen, in whole and in part, with and without slots."""
    slots = [row % 4 - 1 for row in range(rows)]
    check_product(*layer(rows, 512, 768, 64, num_slots=3, slots=slots, dtype=dtype))
    check_product(*layer(rows, 500, 720, 48, dtype=dtype))


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> None:
    """As in tests/kernels, but held to rounding: u |z|."""
    there = [None if tensor is None else moved(tensor) for tensor in (x, weight, bias)]
    z = linear_rotate(*there, on_gpu(turns))
    assert z.dtype == x.dtype
    truth = truth_of(x, weight, bias, turns)
    inside = (x.shape[1] + 4) * unit_roundoff(torch.float32) * reach_of(x, weight, bias, turns)
    last = unit_roundoff(x.dtype) * truth.abs() + torch.finfo(x.dtype).smallest_normal
    error = (z.cpu().double() - truth).abs()
    assert bool((error <= 1.01 * (inside + last)).all()), (
        f"an error of {float((error / (inside + last)).max()):.3g} bounds"
    )
