"""Launches of a kernel that are remembered: Triton's own way to a kernel looks at every argument at every launch.

It compiles a kernel for the dtypes of its tensors, for addresses that are multiples of 16 or for any, for what the integers are
(1, a multiple of 16, more than 31 bits) and for the constants. All but dtypes and addresses follows from `facts`, by which a
launch is remembered; where an address is not a multiple of 16, Triton's own way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from roadie.kernels.keeping import address, without_lazy_copy

_MOST = 4096  # launches of one kernel that are remembered
ALIGNED = 16


class Launch(NamedTuple):
    """The grid, what comes after the tensors, the constants in order, and options."""

    grid: tuple[int, int]
    integers: tuple[int, ...]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]


class Launches:
    """Launches of one kernel, whose arguments are its tensors, then integers, then constants.

    shared: which tensor is only read, though a lazy copy may share its memory (`roadie.kernels.keeping`). can_be_remembered:
    whether launches are; else all go Triton's own way.
    """

    def __init__(self, kernel: Any, shared: int | None = None) -> None:
        self._kernel, self._shared, self.can_be_remembered = kernel, shared, _can_be_remembered(kernel)
        self._ready: dict[Hashable, Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Tensor], facts: Hashable, made: Callable[[], Launch]) -> None:
        """Launch it; made: how, which depends on `facts` alone."""
        if not self.can_be_remembered:
            self._launch(tensors, made())
            return
        shared, all_bits = self._shared, 0
        kinds: list[torch.dtype] = []
        places: list[int] = []
        for tensor in tensors:
            place = address(tensor) if len(places) == shared else tensor.data_ptr()
            all_bits |= place
            places.append(place)
            kinds.append(tensor.dtype)
        if all_bits % ALIGNED:
            self._launch(tensors, made())
            return
        key = facts, tensors[0].get_device(), *kinds
        ready = self._ready.get(key)
        if ready is None:
            if len(self._ready) == _MOST:
                self._ready.clear()
            ready = self._ready[key] = self.prepare(tensors, made())
        ready(*places)

    def prepare(self, tensors: Sequence[Tensor], launch: Launch) -> Callable[..., None]:
        """What launches it with the addresses of tensors of the same kinds, as much aligned as these are."""
        grid, integers, constants, options = launch
        with self._readable(tensors):
            compiled = self._kernel.warmup(*tensors, *integers, **constants, **options, grid=grid)
        run, others = compiled[grid[0], grid[1], 1], (*integers, *constants.values())

        def ready(*places: int) -> None:
            run(*places, *others)

        return ready

    def _launch(self, tensors: Sequence[Tensor], launch: Launch) -> None:
        """Triton's own way."""
        with self._readable(tensors):
            self._kernel[launch.grid](*tensors, *launch.integers, **launch.constants, **launch.options)

    def _readable(self, tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
        return _HERE if self._shared is None else without_lazy_copy(tensors[self._shared])


def _can_be_remembered(kernel: Any) -> bool:
    """Whether a compiled kernel takes the arguments of the function, constants among them: from Triton 3.3 on.

    Not for AMD's devices, for which a kernel is compiled for the size of each tensor's memory, too.
    """
    if isinstance(kernel, InterpretedFunction) or torch.version.hip is not None:
        return False
    return "constexprs" in signature(triton.compiler.ASTSource).parameters


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if is_current(device):
        return _HERE
    guard: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return guard


_HERE = nullcontext()


def is_current(device: torch.device) -> bool:
    """Whether a launch goes to this device."""
    return device.index is None or device.index == getattr(torch, device.type).current_device()
