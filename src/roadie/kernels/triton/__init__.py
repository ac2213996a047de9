"""Rotations on GPUs, written in Triton; imported only when they are used, so that roadie works without Triton.

`rotation` has the kernel for R x and R^T x, `backward` those for the gradient with its sums over rows, `matmul` a matrix
product that rotates its result before it is written; `tiles` cuts the work into programs, `pairs` reads and writes pairs,
`tasks` sorts the rows of a mixed batch.

**On CPUs** the kernels run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 was set before triton was
imported. It truncates where it should round to half precision: only its float32 results are those of a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from roadie.kernels.contract import Implementation, RowRotations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda, too


class TritonImplementation(Implementation):
    """Triton kernels for float32, bfloat16 and float16 on GPUs; see the package."""

    name = "triton"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """Why Triton cannot rotate such tensors here, or None where it can."""
        if dtype not in DTYPES:
            return f"it computes in float32, for float32, bfloat16 and float16, and got {dtype}; float64 would lose digits"
        if table_dtype not in (torch.float32, dtype):
            return f"it takes tables in float32 or in the dtype of the activations, {dtype}, and got {table_dtype}"
        try:
            from roadie.kernels.triton import runtime
        except ImportError as error:
            return f"triton cannot be imported ({error}); pip install triton"
        return runtime.refusal(device, dtype)

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        from roadie.kernels.triton import rotation

        if x.numel():
            with _current(x.device):
                rotation.rotate(x, out, turns)

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
    ) -> None:
        """R^T grad into grad_x, and the sums over rows; see the contract."""
        from roadie.kernels.triton import backward, rotation

        if not grad.numel():
            for total in (own, partner):
                if total is not None:
                    total.zero_()
            return
        with _current(grad.device):
            if kept is not None:
                assert own is not None
                assert partner is not None
                backward.backward_with_sums(grad, kept, grad_x, turns, own, partner)
            elif grad_x is not None:
                rotation.rotate(grad, grad_x, turns, transposed=True)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]
