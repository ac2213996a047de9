"""Bytes: what autograd keeps for backward, and the peak of a process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def bytes_kept(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward after `run`: each storage once and whole, parameters left out.

    The result of `run` must hold the graph (a loss or an output). A view of a large tensor keeps all of it alive, so whole
    storages are counted, not the tensors that were saved.
    """
    own = {_storage(parameter) for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    del result
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory of this process rises above where it was, at the most, while `run` runs.

    On Linux the kernel's high-water mark is reset first. Elsewhere it is the rise of the process's lifetime peak, so call
    this once a process, before anything larger has run.
    """
    gc.collect()
    _trim()
    if not _can_reset():
        before = _lifetime_peak()
        run()
        return _lifetime_peak() - before
    _CLEAR.write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _can_reset() -> bool:
    return _CLEAR.exists() and _STATUS.exists()


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _trim() -> None:
    """Give freed memory back, so that a run cannot use it without being seen (glibc; elsewhere nothing happens)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
