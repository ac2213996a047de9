"""A rotation on a GPU that is ready to be launched again and again: for decoding, where the host's time is what counts.

Triton's own way to a kernel looks at every argument at every launch. What depends on the rotation alone is known before; what is
left is whether a tensor is of the expected kind, and its address. A kernel is compiled for addresses that are multiples of 16, or
for any, and cut into programs by the number of rows: one is remembered for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from roadie.kernels.contract import RowRotations
from roadie.kernels.triton.rotation import launch_of, rotate_kernel

_MOST_LAUNCHES = 64  # numbers of rows that are remembered
_ALIGNED = 16


class PreparedLaunches:
    """One table and its slots, for outputs like y ``[..., D]``, whose first dimensions are `routed_shape`.

    rotate(y) in place, rotate(y, z) into z; False, with nothing done, where y is not of the expected kind, or not on the device
    that is the current one. Graphs capture it as any launch.
    """

    def __init__(self, turns: RowRotations, routed_shape: tuple[int, ...], y: Tensor) -> None:
        self._turns, self._routed_shape = turns, routed_shape
        self._dtype, self._device, self._width = y.dtype, y.device, turns.direct.shape[1]
        self._launches: dict[tuple[int, bool, bool], Callable[[Tensor, Tensor], None]] = {}

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
            or not _is_current(self._device)
        ):
            return False
        z = y if z is None else z
        is_aligned = (y.data_ptr() | z.data_ptr()) % _ALIGNED == 0
        key = y.numel() // self._width, is_aligned, z is y
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) == _MOST_LAUNCHES:
                return False
            launch = self._launches[key] = self._launch(y, z)
        launch(y, z)
        return True

    def _launch(self, y: Tensor, z: Tensor) -> Callable[[Tensor, Tensor], None]:
        rows, into = (tensor.view(-1, self._width) for tensor in (y, z))
        slots = self._turns.slots
        repeat = len(rows) if slots is None else len(rows) // slots.numel()
        grid, arguments, constants, options = launch_of(rows, into, self._turns._replace(repeat=repeat))
        kernel = rotate_kernel.warmup(rows, into, *arguments, **constants, **options, grid=grid)
        run, others = kernel[grid[0], grid[1], 1], (*arguments, *constants.values())

        def launch(y: Tensor, z: Tensor) -> None:
            run(y, z, *others)

        return launch


def _is_current(device: torch.device) -> bool:
    """Whether a launch goes to this device."""
    return device.index in (None, torch.get_device_module(device).current_device())
