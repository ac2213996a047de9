"""A rotation that is ready to be applied again and again: for decoding, where everything around it counts.

After a base layer has streamed its weight through the caches, Python runs several times slower than in a loop of its own: the
general way to the kernel takes 150 us there, this one 40 (4096 outputs, 8 rows, bfloat16), and the base layer 2 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from roadie.kernels.choice import asked_for
from roadie.kernels.contract import RowRotations
from roadie.kernels.cpu import (
    BYTES_A_THREAD,
    JOB,
    TYPES,
    CpuImplementation,
    loaded,
    stages_of,
    table_work,
    threads_for,
)

# Looked up once: what they are asked for is whether anything in torch wants to see what is done.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


class PreparedRotation:
    """A table or several in a row, the slots of the rows, and tensors that they were made from, with what they held.

    `rotate_` and `rotated` compute only where that is all it takes: they answer False, or None, and leave their argument alone,
    where a watched tensor has changed, y is not of the expected kind, or some mode of torch wants to see what is done.
    """

    __slots__ = (
        *("_chain", "_content", "_dtype", "_function", "_head", "_routed", "_routed_shape", "_tail", "_then"),
        *("_table_work", "_watched", "_watched_bytes", "_width"),
    )

    def __init__(
        self,
        chain: Sequence[RowRotations],
        routed_shape: tuple[int, ...],
        dtype: torch.dtype,
        watched: tuple[Tensor, Tensor] | None,
    ) -> None:
        direct, cross, slots, _, sizes, group_size = chain[0]
        self._routed_shape = routed_shape
        self._chain, self._dtype, self._width = tuple(chain), dtype, direct.shape[1]  # (kept alive)
        self._watched = watched
        self._content: tuple[Tensor, ...] = ()
        self._then: tuple[int, ...] = ()
        self._watched_bytes = 0
        if watched is not None:
            self._content = tuple(tensor.detach().clone() for tensor in watched)
            self._then = tuple(content.data_ptr() for content in self._content)
            self._watched_bytes = self._content[0].nbytes
        self._function: Callable[[bytes], int] = loaded().rotate
        if len(chain) > 1:
            self._function = partial(loaded().rotate_chain, stages_of(chain), len(chain))
        self._table_work = table_work(chain)
        self._routed = slots.numel() if slots is not None else 1
        of_slots, of_sizes = (0 if slots is None else slots.data_ptr()), (0 if sizes is None else sizes.data_ptr())
        self._head = (direct.data_ptr(), cross.data_ptr(), of_slots, of_sizes, 0, 0)
        self._tail = (direct.shape[0], group_size, TYPES[dtype], TYPES[direct.dtype])

    def rotate_(self, y: Tensor, into: Tensor | None = None) -> bool:
        """R y in place, y ``[..., D]`` contiguous, in the dtype that was prepared for; whether it was done.

        into: memory like y's, which gets R y instead; y stays as it is.
        """
        width, routed = self._width, self._routed
        if (
            type(y) is not Tensor
            or y.dtype is not self._dtype
            or y.shape[-1] != width
            or not y.is_contiguous()
            or (self._routed_shape and y.shape[: len(self._routed_shape)] != self._routed_shape)
            or _dispatch_modes()
            or _transforms() is not None
            or _tracing() is not None
            or forward_ad._current_level >= 0
            or asked_for() is not None
        ):
            return False
        rows, address = y.numel() // width, y.data_ptr()
        into_address = address if into is None else into.data_ptr()
        if not rows or not routed:
            return False
        nbytes = 2 * y.nbytes + self._table_work
        threads = 1 if nbytes < 2 * BYTES_A_THREAD else threads_for(nbytes)
        now: tuple[int, ...] = (0, 0)
        then: tuple[int, ...] = (0, 0)
        if self._watched is not None:  # the memory of the watched tensors may have been replaced
            now, then = (self._watched[0].data_ptr(), self._watched[1].data_ptr()), self._then
        sizes = (self._watched_bytes, rows, width, width, 0, width, rows // routed)
        return not self._function(
            JOB.pack(address, 0, into_address, *self._head, *now, *then, *sizes, *self._tail, threads)
        )

    def rotated(self, y: Tensor) -> Tensor | None:
        """R y in new memory, y as in `rotate_`; None where it was not done."""
        z = torch.empty_like(y)
        return z if self.rotate_(y, z) else None


def prepare(
    chain: Sequence[RowRotations], routed_shape: tuple[int, ...], y: Tensor, watched: tuple[Tensor, Tensor] | None
) -> PreparedRotation | None:
    """One rotation, or several in a row, for outputs like y, whose first dimensions are `routed_shape`.

    None where the compiled kernel cannot be used, or something watched is not plain CPU memory.
    """
    if CpuImplementation().refusal(y.device, y.dtype, chain[0].direct.dtype) is not None:
        return None
    if watched is not None and not all(_can_be_watched(tensor, watched[0]) for tensor in watched):
        return None
    return PreparedRotation(chain, routed_shape, y.dtype, watched)


def _can_be_watched(tensor: Tensor, like: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes == like.nbytes
