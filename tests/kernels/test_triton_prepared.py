"""Prepared launches on GPUs are those that Triton's own way makes; without one, a driver stands in that only writes them down.

Kernels are compiled for a GPU, which needs none; that excludes interpreting, so that this file runs itself in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import HANG_S

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="a build of triton without NVIDIA's compiler")

LAUNCHES: list[tuple[Any, ...]] = []
ALL_IS_WELL = "all launches are the same"


class Launcher:
    """In place of what launches a kernel: writes down which, on what grid and with what."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: Any, *others: Any) -> None:
        arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in others[5:]]
        LAUNCHES.append((id(self), x, y, z, stream, *arguments))


class Utils:
    """In place of a device's properties."""

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
        return 7

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def check() -> None:
    """Every launch by both ways."""
    from triton.runtime.driver import driver

    from roadie.kernels.contract import RowRotations
    from roadie.kernels.triton import rotation
    from roadie.kernels.triton.prepared import PreparedLaunches

    driver.set_active(Driver())
    D, S = 64, 3
    table = torch.ones(S, D), torch.zeros(S, D)
    sizes = torch.tensor([8, 16, 64], dtype=torch.int32)
    cases = [
        ((), None, None, [(1, D), (5, D), (2, 3, D)]),
        ((4,), torch.tensor([0, 2, -1, 1]), None, [(4, D), (4, 7, D)]),
        ((2, 3), torch.tensor([[0, 2, -1], [1, 1, 0]]), sizes, [(2, 3, D)]),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for routed_shape, slots, of_slot, shapes in cases:
            flat = None if slots is None else slots.view(-1)
            turns = RowRotations(*table, flat, 1, of_slot, 0 if of_slot is not None else 8)
            prepared = PreparedLaunches(turns, routed_shape, torch.empty(shapes[0], dtype=dtype))
            for shape in shapes:
                for offset in (0, 1):
                    size = torch.Size(shape).numel()
                    y, other = (torch.empty(size + offset, dtype=dtype)[offset:].view(shape) for _ in range(2))
                    for z in (y, other):
                        _compare(prepared, rotation.rotate, turns, y, z)
            assert_refused(prepared, torch.empty(shapes[0], dtype=dtype))
    _check_that_numbers_of_rows_share_a_kernel(rotation.rotate, RowRotations(*table, None, 1, None, 8), D)
    print(ALL_IS_WELL)


def _check_that_numbers_of_rows_share_a_kernel(rotate: Any, turns: Any, width: int) -> None:
    """A request of another length must not wait for a compiler."""
    for rows in (16, 7, 5):
        rotate(torch.empty(rows, width), torch.empty(rows, width), turns)
    kernels = {launch[0] for launch in LAUNCHES}
    LAUNCHES.clear()
    assert len(kernels) == 1


def _compare(prepared: Any, rotate: Any, turns: Any, y: torch.Tensor, z: torch.Tensor) -> None:
    rows, into = y.view(-1, y.shape[-1]), z.view(-1, z.shape[-1])
    repeat = 1 if turns.slots is None else len(rows) // turns.slots.numel()
    rotate(rows, into, turns._replace(repeat=repeat))
    wanted = LAUNCHES.pop()
    for _ in range(2):  # made, then remembered
        assert prepared(y) if z is y else prepared(y, z)
        assert LAUNCHES.pop() == wanted, (LAUNCHES, wanted)
    assert not LAUNCHES


def assert_refused(prepared: Any, y: torch.Tensor) -> None:
    """What is not as expected is not launched."""
    wide = torch.empty(*y.shape[:-1], 2 * y.shape[-1], dtype=y.dtype)
    others = [y.double(), wide, wide[..., ::2], y[:0], y.flatten()[0], torch.nn.Parameter(y), y.to("meta")]
    for other in others:
        assert not prepared(other), (other.shape, other.dtype)
    if y.dim() > 1 and len(y) > 1:
        assert not prepared(y[:1])
    assert not LAUNCHES


@pytest.mark.slow
def test_they_are_those_of_tritons_own_way() -> None:
    code = "from tests.kernels.test_triton_prepared import check; check()"
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ALL_IS_WELL in done.stdout
