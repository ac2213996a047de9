"""A rotation on a GPU that is ready to be launched again and again: for decoding, where the host's time is what counts.

What depends on the rotation alone is known before; what is left is whether a tensor is of the expected kind, and its address. A
kernel is compiled for addresses that are multiples of 16, or for any, and cut into programs by the number of rows: one launch is
remembered for each (`launches`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from roadie.kernels.contract import RowRotations
from roadie.kernels.triton.launches import ALIGNED, is_current
from roadie.kernels.triton.rotation import launch_of, launches, tensors_of

_MOST_LAUNCHES = 64  # numbers of rows that are remembered


class PreparedLaunches:
    """One table and its slots, for outputs like y ``[..., D]``, whose first dimensions are `routed_shape`.

    rotate(y) in place, rotate(y, z) into z; False, with nothing done, where y is not of the expected kind, or not on the device
    that is the current one. Graphs capture it as any launch.
    """

    def __init__(self, turns: RowRotations, routed_shape: tuple[int, ...], y: Tensor) -> None:
        self._turns, self._routed_shape = turns, routed_shape
        self._dtype, self._device, self._width = y.dtype, y.device, turns.direct.shape[1]
        self._launches: dict[tuple[int, bool, bool], Callable[..., None]] = {}
        self._tensors = tensors_of(turns)  # kept alive, so that they are where they were
        self._places = [tensor.data_ptr() for tensor in self._tensors]

    def __call__(self, y: Tensor, z: Tensor | None = None) -> bool:
        shape = y.shape
        if (
            type(y) is not Tensor
            or y.dtype is not self._dtype
            or y.device != self._device
            or not shape
            or shape[-1] != self._width
            or shape[: len(self._routed_shape)] != self._routed_shape
            or not y.is_contiguous()
            or not y.numel()
            or not is_current(self._device)
        ):
            return False
        z = y if z is None else z
        here, there = y.data_ptr(), z.data_ptr()
        key = y.numel() // self._width, (here | there) % ALIGNED == 0, z is y
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) == _MOST_LAUNCHES:
                return False
            launch = self._launches[key] = self._launch(y, z)
        launch(here, there, *self._places)
        return True

    def _launch(self, y: Tensor, z: Tensor) -> Callable[..., None]:
        rows, into = (tensor.view(-1, self._width) for tensor in (y, z))
        slots = self._turns.slots
        repeat = len(rows) if slots is None else len(rows) // slots.numel()
        launch = launch_of(rows, into, self._turns._replace(repeat=repeat))
        return launches.prepare((rows, into, *self._tensors), launch)
