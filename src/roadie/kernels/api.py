"""The only door to the kernels: rotate a batch, or each row of it by the rotation of its own slot.

    rotate(x, rotation)                 every row alike
    rotate_rows(x, table, slots)        row by row; slot -1 is the base and leaves its rows as they are
    rotate_(x, rotation), rotate_rows_  the same in place, where no gradient is needed

All four are differentiable in x, direct and cross but for the last two. ``keep`` says what backward remembers: the
rotation's "input", or its "output", which the next operation often keeps anyway, or the output as a lazy "copy", which whoever
changes the output in place does not reach; see `roadie.kernels.keeping`.

Legend: x ``[..., D]`` of any floating dtype, S slots, B routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from roadie.errors import AdapterError, ConfigError, RoutingError
from roadie.kernels import schema
from roadie.kernels.cpu.prepared import PreparedRotation, prepare
from roadie.kernels.eager import composed
from roadie.kernels.keeping import PLAIN, Keep, settled
from roadie.rotation import Rotation, check_group_size


@dataclass(frozen=True, eq=False)
class RotationTable:
    """A rotation a slot: direct, cross ``[S, D]``; group_sizes: one for all slots, or each slot's own, int32 ``[S]``.

    Group sizes given as a tensor are trusted here and checked where they are used on a CPU.
    """

    direct: Tensor
    cross: Tensor
    group_sizes: int | Tensor

    @property
    def uniform_size(self) -> int:
        """The group size of all slots, or 0 where each has its own."""
        return self.group_sizes if isinstance(self.group_sizes, int) else 0

    @property
    def sizes(self) -> Tensor | None:
        """The group size of each slot, or None where all have the same."""
        return None if isinstance(self.group_sizes, int) else self.group_sizes


def rotate(x: Tensor, rotation: Rotation, *, keep: Keep | str = Keep.INPUT) -> Tensor:
    """``R x``: x ``[..., D]``, rotation ``[D]``; new memory, x's dtype, one rounding; differentiable.

    keep: "input"; or "output" or "copy" (R must not be singular then); nobody may change an "output" in place before backward.
    Raises `AdapterError` where the shapes do not fit, `ConfigError` for another `keep`.
    """
    return rotate_rows(x, _table_of_one(rotation), None, keep=keep)


def rotate_(x: Tensor, rotation: Rotation) -> Tensor:
    """``R x`` in place of x, which is returned; for tensors that need no gradient. Raises as `rotate` does."""
    return rotate_rows_(x, _table_of_one(rotation), None)


def rotate_rows(x: Tensor, table: RotationTable, slots: Tensor | None, *, keep: Keep | str = Keep.INPUT) -> Tensor:
    """Each row of x by the rotation of its slot, in new memory of x's dtype, with one rounding; differentiable.

    x: ``[B, ..., D]``; slots: int64, its shape that of x's first dimensions (``[B]``: a slot for x[b], ``[B, T]``: for
    x[b, t]), from -1 (the base) to S - 1, on x's device; None: slot 0 for every row. keep: as in `rotate`.
    Raises `AdapterError`, `RoutingError` where shapes do not fit, `KernelError` for slots out of range (on CPUs).
    """
    arguments = checked(x, table, slots)
    keep = settled(_keep(keep), x)
    if must_be_seen_through(x):
        return composed(*arguments)
    if is_plain(x, table):
        if needs_gradient(x, table):
            z, _ = schema.EagerRotation.apply(*arguments, keep)
            return z
        return schema.forward(*arguments)
    z = torch.ops.roadie.rotate_rows(*arguments, keep is not Keep.INPUT)
    return z._lazy_clone() if keep is Keep.COPY and z.requires_grad else z  # here modes of torch may hold z as well


def can_rotate_in_place(x: Tensor, table: RotationTable) -> bool:
    """Whether `rotate_rows_` may be used: nothing here needs a gradient, and nobody traces what is computed."""
    return takes_kernels(x, table) and not needs_gradient(x, table)


def takes_kernels(x: Tensor, table: RotationTable) -> bool:
    """Whether x and the table are memory and nothing else, and nothing of torch looks on: tracers, transforms, modes."""
    return not must_be_seen_through(x) and is_plain(x, table)


def rotate_rows_(x: Tensor, table: RotationTable, slots: Tensor | None) -> Tensor:
    """As `rotate_rows`, in place of x, which is returned. Raises `AdapterError` where a gradient is needed."""
    arguments = checked(x, table, slots)
    if needs_gradient(x, table):
        raise AdapterError(
            "got tensors that need a gradient; rotating in place would lose it; use rotate_rows, or torch.no_grad()"
        )
    if must_be_seen_through(x) or not is_plain(x, table):
        return x.copy_(rotate_rows(x, table, slots))
    schema.forward_(*arguments)
    if not x.is_inference():  # so that autograd sees the change of what it saved
        torch.autograd.graph.increment_version(x)
    return x


class RotationStep:
    """Forward and backward of a rotation for an `autograd.Function` that has one inside; only where `takes_kernels`.

    table: ``[S, D]``; slots as in `rotate_rows`; keep: what forward's caller saves for backward (`to_save`).
    """

    def __init__(self, table: RotationTable, slots: Tensor | None, keep: Keep) -> None:
        self._arguments = table.direct, table.cross, slots, table.sizes, table.uniform_size
        self.keep = keep

    def forward(self, y: Tensor, *, into_y: bool) -> Tensor:
        """R y, in new memory or in place of y."""
        return schema.forward_(y, *self._arguments) if into_y else schema.forward(y, *self._arguments)

    def backward(self, grad: Tensor, kept: Tensor, *, want_y: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of y (None where not wanted), and of direct and cross ``[S, D]``."""
        grad_y, grad_direct, grad_cross = schema.gradients(
            grad, kept, *self._arguments, self.keep is not Keep.INPUT, want_y
        )
        assert grad_direct is not None
        assert grad_cross is not None
        return grad_y, grad_direct, grad_cross


def prepare_rotation(
    y: Tensor, table: RotationTable, slots: Tensor | None, watched: tuple[Tensor, Tensor] | None = None
) -> PreparedRotation | None:
    """`rotate_rows_` of tensors like y, made ready to be called many times; None where that would win nothing.

    watched: two tensors on the CPU, of equal size, that the table was made from; when they hold something else, the result
    refuses to rotate.
    """
    routed_shape = tuple(slots.shape) if slots is not None else ()
    return prepare([schema.row_rotations(*checked(y, table, slots))], routed_shape, y, watched)


def _table_of_one(rotation: Rotation) -> RotationTable:
    if rotation.direct.dim() != 1:
        raise AdapterError(
            f"got a rotation of shape {tuple(rotation.direct.shape)}; wanted [D]; use rotate_rows for a table [S, D]"
        )
    return RotationTable(rotation.direct.unsqueeze(0), rotation.cross.unsqueeze(0), rotation.group_size)


def _keep(keep: Keep | str) -> Keep:
    if isinstance(keep, Keep):
        return keep
    try:
        return Keep(keep)
    except ValueError:
        raise ConfigError(f"got keep={keep!r}; wanted 'copy', 'input' or 'output'") from None


def is_plain(x: Tensor, table: RotationTable) -> bool:
    """Whether all are memory and nothing else, and no mode of torch wants to see what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and type(table.direct) in PLAIN
        and type(table.cross) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
    )


def must_be_seen_through(x: Tensor) -> bool:
    """Whether torch needs plain operations: for export, tracing, torch.func, forward mode, and tensors made of tensors."""
    if torch.compiler.is_compiling():  # compilers take our operation as it is
        return _is_exporting()
    return (
        _is_made_of_tensors(x)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _is_made_of_tensors(x: Any) -> bool:
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x)


def _is_exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())  # from torch 2.7 on


def needs_gradient(x: Tensor, table: RotationTable) -> bool:
    """Whether autograd wants to know of a rotation of x."""
    return torch.is_grad_enabled() and (x.requires_grad or table.direct.requires_grad or table.cross.requires_grad)


def checked(
    x: Tensor, table: RotationTable, slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """What the operations take, once it fits together."""
    direct, cross, width = table.direct, table.cross, x.shape[-1] if x.dim() else 0
    if direct.dim() != 2 or direct.shape != cross.shape or direct.shape[1] != width or not len(direct):
        raise AdapterError(
            f"got x {tuple(x.shape)}, direct {tuple(direct.shape)} and cross {tuple(cross.shape)}; wanted x [..., D] and "
            "two tables [S, D] of the same D, with at least one slot"
        )
    if direct.dtype != cross.dtype or direct.device != x.device or cross.device != x.device:
        raise AdapterError(
            f"got x on {x.device}, direct {direct.dtype} on {direct.device} and cross {cross.dtype} on {cross.device}; "
            "wanted one device, and tables of one dtype"
        )
    if isinstance(table.group_sizes, int):
        if width % table.group_sizes or table.group_sizes % 2:
            check_group_size(table.group_sizes, width)
    elif table.group_sizes.shape != direct.shape[:1] or table.group_sizes.dtype != torch.int32:
        raise AdapterError(
            f"got group_sizes {table.group_sizes.dtype} {tuple(table.group_sizes.shape)}; wanted int32 [{len(direct)}]"
        )
    if slots is not None and (
        slots.dtype != torch.int64
        or not 0 < slots.dim() < x.dim()
        or x.shape[: slots.dim()] != slots.shape
        or slots.device != x.device
    ):
        raise RoutingError(
            f"got slots {slots.dtype} {tuple(slots.shape)} on {slots.device} for x {tuple(x.shape)} on {x.device}; wanted "
            "int64 on x's device, in the shape of x's first dimensions: one slot for each row, or for each token"
        )
    return x, direct, cross, slots, table.sizes, table.uniform_size
