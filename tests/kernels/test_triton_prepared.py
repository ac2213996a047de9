"""Launches that are remembered are those that Triton's own way makes; without a GPU, a driver stands in that writes them down.

Kernels are compiled for a GPU, which needs none; that excludes interpreting, so that this file runs itself in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from benchmarks import stand_in
from benchmarks.stand_in import LAUNCHES
from tests.patience import HANG_S

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="a build of triton without NVIDIA's compiler")

ALL_IS_WELL = "all launches are the same"


def check() -> None:
    """Every launch by both ways."""
    with stand_in.gpu(), stand_in.recorded():
        _check_rotations()
        _check_gradients()
    print(ALL_IS_WELL)


def _check_rotations() -> None:
    from roadie.kernels.contract import RowRotations
    from roadie.kernels.triton import rotation
    from roadie.kernels.triton.prepared import PreparedLaunches

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


def _check_that_numbers_of_rows_share_a_kernel(rotate: Any, turns: Any, width: int) -> None:
    """A request of another length must not wait for a compiler."""
    for rows in (16, 7, 5, 16, 7, 5):
        rotate(torch.empty(rows, width), torch.empty(rows, width), turns)
    kernels = {launch[0] for launch in LAUNCHES}
    LAUNCHES.clear()
    assert len(kernels) == 1


def _compare(prepared: Any, rotate: Any, turns: Any, y: torch.Tensor, z: torch.Tensor) -> None:
    rows, into = y.view(-1, y.shape[-1]), z.view(-1, z.shape[-1])
    repeat = 1 if turns.slots is None else len(rows) // turns.slots.numel()
    wanted = _the_same_by_both_ways(lambda: rotate(rows, into, turns._replace(repeat=repeat)))
    for _ in range(2):  # made, then remembered
        assert prepared(y) if z is y else prepared(y, z)
        assert _launched() == wanted


def _check_gradients() -> None:
    """Of one slot in one task, of one in many, and of rows of many slots; of an input that is kept, and of an output."""
    from roadie.kernels.contract import RowRotations
    from roadie.kernels.triton import backward

    D, S = 64, 3
    sizes = torch.tensor([8, 16, 64], dtype=torch.int32)
    scratch, tasks_of = torch.empty(1000, 2, D), cache(backward.tasks_of)
    given = mock.Mock(float32=torch.float32, empty=lambda rows, *_, **__: scratch[:rows])
    with mock.patch.object(backward, "torch", given), mock.patch.object(backward, "tasks_of", tasks_of):
        for dtype, kept_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
            for rows, slots, of_slot in ((1, None, None), (200, None, None), (12, torch.tensor([2, 0, -1] * 4), sizes)):
                num_slots = 1 if slots is None else S
                table, sums = torch.ones(2, num_slots, D), torch.empty(2, num_slots, D)
                grad, kept, into = (torch.empty(rows, D, dtype=kind) for kind in (dtype, kept_dtype, dtype))
                turns = RowRotations(*table, slots, 1, of_slot, 0 if of_slot is not None else 8)
                for grad_x, solve in ((into, 0), (None, 1), (into, 2)):
                    arguments = grad, kept, grad_x, turns, *sums, solve
                    launched = _the_same_by_both_ways(
                        lambda arguments=arguments: backward.backward_with_sums(*arguments)
                    )
                    assert len(launched) == (1 if rows == 1 else 2)


def _the_same_by_both_ways(run: Callable[[], None]) -> list[Any]:
    """What is launched, by Triton's own way and twice as it is remembered."""
    from roadie.kernels.triton.launches import Launches

    with mock.patch.object(Launches, "__call__", lambda self, tensors, _, made: self._launch(tensors, made())):
        run()
    wanted = _launched()
    assert wanted
    for _ in range(2):
        run()
        assert _launched() == wanted
    return wanted


def _launched() -> list[Any]:
    """What was, since this was asked for."""
    launched = list(LAUNCHES)
    LAUNCHES.clear()
    return launched


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
