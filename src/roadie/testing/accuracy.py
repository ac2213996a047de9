"""Comparing by error, not by tolerance: a result is right if it is no further from the truth than a plain computation."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64; inf where the value is not finite."""
    if value.shape != truth.shape:
        raise AssertionError(f"got shape {tuple(value.shape)}; wanted {tuple(truth.shape)}")
    difference = torch.linalg.vector_norm(value.double() - truth.double())
    size = torch.linalg.vector_norm(truth.double())
    error = float(difference / size) if size > 0 else float(difference)
    return error if error == error else float("inf")


def assert_as_accurate_as(value: Tensor, rival: Tensor, truth: Tensor, *, slack: float = 1.1) -> None:
    """Assert that `value` has the rival's dtype and shape and an error (against a float64 `truth`) of at most slack times its.

    slack (a ratio) covers another order of summation; an error below the unit roundoff of the dtype always passes.
    """
    assert value.dtype == rival.dtype, f"got dtype {value.dtype}; wanted {rival.dtype}"
    ours, theirs = relative_error(value, truth), relative_error(rival, truth)
    floor = unit_roundoff(value.dtype)
    assert ours <= max(slack * theirs, floor), (
        f"got an error of {ours:.3g}; wanted at most {slack} x {theirs:.3g} (rival)"
    )


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype: 2^-53 for float64, 2^-24, 2^-11 (float16), 2^-8 (bfloat16)."""
    return torch.finfo(dtype).eps / 2


def two_orders(num_terms: int, dtype: torch.dtype) -> float:
    """How far apart two results of one sum may lie, relative to the sum of its terms' sizes, whatever the order of either.

    Each of a sum's num_terms roundings is off by at most a unit roundoff u of what has been summed: n u, and twice that for two.
    Holds across processors, numbers of processes, kernels and shapes of batches, which differ in the order of their sums.
    """
    return 2 * num_terms * unit_roundoff(dtype)


def smallest_step(dtype: torch.dtype) -> float:
    """The distance of the numbers of a dtype near 0, where rounding is absolute: 2^-24 for float16."""
    return float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps


def assert_same_bits(value: Tensor, wanted: Tensor, what: str) -> None:
    """Assert equal shape, dtype and bits (so that -0.0 is not 0.0, and NaN is itself)."""
    assert value.dtype == wanted.dtype, f"{what}: got dtype {value.dtype}; wanted {wanted.dtype}"
    assert value.shape == wanted.shape, f"{what}: got shape {tuple(value.shape)}; wanted {tuple(wanted.shape)}"
    bits = (tensor.detach().contiguous().view(torch.uint8) for tensor in (value, wanted))
    assert torch.equal(*bits), f"{what}: the bits differ"
