"""Which implementation computes: chosen by device and dtype, or asked for, and always visible.

    with using("eager"):        # whatever rotates inside, in forward or in backward, does so in plain tensor operations
        model(batch)

One that was asked for and cannot run raises `KernelError` with the reason; nothing falls back silently. Without a wish,
GPUs use `triton`, CPUs `cpu`, and `eager` takes over where these cannot work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from roadie.errors import KernelError
from roadie.kernels.contract import Implementation
from roadie.kernels.cpu import CpuImplementation
from roadie.kernels.eager import EagerImplementation
from roadie.kernels.triton import TritonImplementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (TritonImplementation(), CpuImplementation(), EagerImplementation())
}

_asked_for: ContextVar[str | None] = ContextVar("roadie_kernel", default=None)
asked_for = _asked_for.get  # what `using` asks for here, if anything; no function of Python's, which takes longer


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the block (and thread), rotations are computed by the implementation `name`: "eager", "cpu" or "triton".

    Raises `KernelError` for unknown names here, and for tensors that it cannot work on where they are rotated. Backward
    runs on the calling thread for CPU tensors; for tensors on GPUs torch runs it on a thread of its own, outside.
    """
    if name not in IMPLEMENTATIONS:
        raise KernelError(f"got implementation {name!r}; wanted one of {', '.join(sorted(IMPLEMENTATIONS))}")
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def chosen(device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> Implementation:
    """The implementation for activations of `dtype` on `device`; raises `KernelError` where one was asked for and cannot."""
    name = asked_for()
    if name is None:
        return _best(device, dtype, table_dtype)
    reason = IMPLEMENTATIONS[name].refusal(device, dtype, table_dtype)
    if reason is not None:
        raise KernelError(f"got implementation {name!r} for {dtype} on {device}, which cannot run: {reason}")
    return IMPLEMENTATIONS[name]


@cache
def _best(device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> Implementation:
    """The first that can, in the order of `IMPLEMENTATIONS`; on the CPU never triton's interpreter, which is for tests."""
    for implementation in IMPLEMENTATIONS.values():
        if implementation.name == "triton" and device.type == "cpu":
            continue
        reason = implementation.refusal(device, dtype, table_dtype)
        if reason is None:
            return implementation
    raise KernelError(f"got {dtype} on {device}, which no implementation can rotate: {reason}")


def refusals(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each implementation why it cannot rotate `dtype` on `device` (tables in float32), or None where it can."""
    return {
        name: implementation.refusal(device, dtype, torch.float32) for name, implementation in IMPLEMENTATIONS.items()
    }
