"""How far apart results may be, by the arithmetic they come from."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype roadie computes in for tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(value: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """Assert ``|value - truth| <= bound`` in every element; bound is derived from the arithmetic, in float64."""
    assert value.shape == truth.shape, f"{what}: got shape {tuple(value.shape)}; wanted {tuple(truth.shape)}"
    error = (value.double() - truth.double()).abs()
    wrong = ~(error <= bound)
    if bool(wrong.any()):
        worst = (error / bound).nan_to_num(torch.inf).max()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ by more than rounding can; got an error of "
            f"{float(worst):.3g} times the bound"
        )
