"""A GPU that only counts: tensors of the CPU take the ways of a GPU's, and launches of Triton's kernels do nothing.

For what a call costs the processor that issues the work (`benchmarks.host_cost --device stand-in`), and for tests of how kernels
are launched, on a machine without a GPU. Kernels are compiled for a real one, by Triton itself and at the first launch; what a
launch takes beyond Triton's Python, the driver's own time, is left out, for all rivals alike. Nothing that a kernel would write
is written. TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

LAUNCHES: list[tuple[Any, ...]] = []
"""What was launched while `is_recording`: which kernel, its grid, stream and arguments, addresses for tensors."""
is_recording = False
_STREAM = 7


class Launcher:
    """In place of what launches a kernel."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: Any, *others: Any) -> None:
        if is_recording:
            arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in others[5:]]
            LAUNCHES.append((id(self), x, y, z, stream, *arguments))


class Utils:
    """In place of a device's properties: an H100's."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    """In place of CUDA's, for an H100."""

    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return _STREAM

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Within the block launches are written down; gives where."""
    global is_recording
    LAUNCHES.clear()
    is_recording = True
    try:
        yield LAUNCHES
    finally:
        is_recording = False


@contextmanager
def gpu() -> Iterator[None]:
    """Within the block tensors of the CPU are rotated as a GPU's are. Nothing made before, or inside, is of use outside."""
    from triton.runtime.driver import driver

    from roadie.kernels import choice, stamp
    from roadie.kernels.triton import launches, prepared, runtime

    if runtime.is_interpreted():
        raise RuntimeError(
            "got kernels that Triton interprets; wanted TRITON_INTERPRET unset before triton is imported"
        )
    before = driver._active
    driver.set_active(Driver())
    ours = choice.IMPLEMENTATIONS["triton"]

    def best(*_: Any) -> Any:
        return ours

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (choice, "_best", best),
        (stamp, "_is_on_cpu", lambda tensor: False),
        (launches, "is_current", _asks_for_device),
        (prepared, "is_current", _asks_for_device),
    ]
    patches = [mock.patch.object(owner, name, instead) for owner, name, instead in changes]
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        driver.set_active(before)


def _asks_for_device(device: torch.device) -> bool:
    """As dear as asking CUDA."""
    return bool(getattr(torch, device.type).current_device())
