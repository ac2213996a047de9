"""Rotations as operations that torch sees: for compilers, tracers, modes of torch and tensors made of tensors.

Legend: x ``[..., D]``, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from roadie.kernels.eager import composed
from roadie.kernels.keeping import Keep, settled
from roadie.kernels.table import Chain, RotationTable, table_without_gaps


def as_operations(x: Tensor, chain: Chain, slots: Tensor | None, keep: Keep) -> Tensor:
    """x through a chain, differentiable; keep: as `roadie.kernels.rotate` has it."""
    if len(chain) == 1:
        return _as_operation(x, chain[0], slots, settled(keep, x))
    value = x.to(torch.float64 if torch.float64 in (x.dtype, chain[0].direct.dtype) else torch.float32)
    for table in chain:
        value = _as_operation(value, *table_without_gaps(table, slots, value.dtype), Keep.INPUT)
    return value.to(x.dtype)


def _as_operation(x: Tensor, table: RotationTable, slots: Tensor | None, keep: Keep) -> Tensor:
    if _must_be_seen_through(x):
        return composed(x, table, slots)
    z: Tensor = torch.ops.roadie.rotate_rows(
        x, table.direct, table.cross, slots, table.sizes, table.uniform_size, keep is not Keep.INPUT
    )
    return z._lazy_clone() if keep is Keep.COPY and z.requires_grad else z  # here modes of torch may hold z as well


def _must_be_seen_through(x: Tensor) -> bool:
    """Whether torch needs plain operations: for export, tracing, torch.func, forward mode, and tensors made of tensors."""
    if torch.compiler.is_compiling():  # compilers take our operation as it is
        return bool(getattr(torch.compiler, "is_exporting", lambda: False)())  # from torch 2.7 on
    return (
        _is_made_of_tensors(x)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _is_made_of_tensors(x: Any) -> bool:
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x)
