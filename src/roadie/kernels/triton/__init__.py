"""Rotations on GPUs, written in Triton; imported only when they are used, so that roadie works without Triton.

`rotation` has the kernel for R x and R^T x, `backward` those for R^T g with the sums over rows and the gradients of the table,
`matmul` a matrix product that rotates its result before it is written; `launches` remembers how kernels are launched, `tiles`
cuts the work into programs, `pairs` reads and writes pairs, `tasks` sorts the rows of a mixed batch.

**On CPUs** the kernels run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 was set before triton was
imported. It truncates where it should round to half precision: only its float32 results are those of a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roadie.kernels.contract import SUMS, Implementation, PreparedRotation, RowRotations, Turns


class TritonImplementation(Implementation):
    """Triton kernels for float32, bfloat16 and float16 on GPUs; see the package."""

    name = "triton"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """Why Triton cannot rotate such tensors here, or None where it can."""
        try:
            from roadie.kernels.triton import runtime
        except ImportError as error:
            return f"triton cannot be imported ({error}); pip install triton"
        return runtime.refusal_of(device, dtype, table_dtype)

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        from roadie.kernels.triton import launches, rotation

        if x.numel():
            with launches.current_device(x.device):
                rotation.rotate(x, out, turns)

    def prepare(self, chain: Turns, routed_shape: tuple[int, ...], y: Tensor) -> PreparedRotation | None:
        """Of a single table, where compiled kernels can be launched again; see the contract."""
        from roadie.kernels.triton import prepared, rotation

        if len(chain) > 1 or not rotation.launches.can_be_remembered:
            return None
        return prepared.PreparedLaunches(chain[0], routed_shape, y)

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
        """R^T grad into grad_x, and what is made of the sums over rows, in the same launches; see the contract."""
        from roadie.kernels.triton import backward, launches, rotation

        with launches.current_device(grad.device):
            if kept is not None:
                assert own is not None
                assert partner is not None
                if grad.numel():
                    backward.backward_with_sums(grad, kept, grad_x, turns, own, partner, solve)
                else:
                    own.zero_(), partner.zero_()
            elif grad_x is not None and grad.numel():
                rotation.rotate(grad, grad_x, turns, transposed=True)
