"""The two doors to the kernels: rotate a batch, or each row of it by the rotations of its own slot.

    rotate(x, rotations, slots)     in new memory, differentiable
    rotate_(x, rotations, slots)    in place, where no gradient is needed

rotations: one `Rotation`, which every row uses; a `RotationTable`, with a rotation a slot; or several tables, for rotations in
a row (a chain). Slot -1 is the base and leaves its rows as they are, bit for bit. All rotations of a row are computed while it is
in the cache: in float32 (float64 for float64), with one rounding at the end. A slot whose group size is 0 in a table has no
rotation there.

``keep`` says what backward remembers: the rotation's "input", or its "output", which the next operation often keeps anyway, or
the output as a lazy "copy", which whoever changes the output in place does not reach; see `roadie.kernels.keeping`. Rotations in
a row keep their input, whatever is asked for: what lies between them is computed again, which is cheaper than a tensor of the
batch's size for each.

Legend: x ``[..., D]`` of any floating dtype, S slots, B routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from roadie.errors import AdapterError, ConfigError
from roadie.kernels.choice import asked_for, chosen
from roadie.kernels.contract import PreparedRotation
from roadie.kernels.eager import composed
from roadie.kernels.keeping import HAVE_LAZY_COPIES, PLAIN, Keep, settled
from roadie.kernels.step import Rotated, turned
from roadie.kernels.table import Chain, RotationTable, as_chain, check, table_without_gaps, turns_of
from roadie.rotation import Rotation

_apply = super(torch.autograd.Function, Rotated).apply  # without looking for transforms, of which there are none here
Rotations: TypeAlias = Rotation | RotationTable | Sequence[RotationTable]


def rotate(
    x: Tensor, rotations: Rotations, slots: Tensor | None = None, *, keep: Keep | str = Keep.INPUT, into_x: bool = False
) -> Tensor:
    """Each row of x by the rotations of its slot, in x's dtype, with one rounding; differentiable in x, direct and cross.

    x: ``[B, ..., D]``; slots: int64, its shape that of x's first dimensions (``[B]``: a slot for x[b], ``[B, T]``: for
    x[b, t]), from -1 (the base) to S - 1, on x's device; None: slot 0 for every row. keep: "input"; or "output" or "copy" (no
    rotation may be singular then); nobody may change an "output" in place before backward. into_x: x may be written to, since
    nobody else holds it; that is done where backward does not need what it holds, and torch does not look on.
    Raises `AdapterError`, `RoutingError` where shapes do not fit, `ConfigError` for another `keep`, `KernelError` for slots out
    of range (on CPUs).
    """
    chain = as_chain(rotations)
    check(x, chain, slots)
    return rotate_checked(x, chain, slots, _keep(keep), into_x)


def rotate_checked(x: Tensor, chain: Chain, slots: Tensor | None, keep: Keep, into_x: bool) -> Tensor:
    """As `rotate`, of what is known to fit together: a layer's output, and tables and slots that were made for it."""
    is_memory, needs_gradient, vectors = _seen(x, chain)
    if not is_memory:
        return _as_operations(x, chain, slots, keep)
    if not needs_gradient:
        return _in_place(x, chain, slots) if into_x else turned(x, turns_of(x, chain, slots))
    if len(chain) > 1 or (keep is Keep.COPY and x.device.type not in HAVE_LAZY_COPIES):
        keep = Keep.INPUT
    into_x = into_x and keep is not Keep.INPUT and not x._is_view()
    z, _ = _apply(x, slots, chain, keep, into_x, *vectors)
    return z


def rotate_(x: Tensor, rotations: Rotations, slots: Tensor | None = None) -> Tensor:
    """As `rotate`, in place of x, which is returned. Raises `AdapterError` where a gradient is needed."""
    chain = as_chain(rotations)
    check(x, chain, slots)
    is_memory, needs_gradient, _ = _seen(x, chain)
    if needs_gradient:
        raise AdapterError(
            "got tensors that need a gradient; rotating in place would lose it; use rotate, or torch.no_grad()"
        )
    if not is_memory:
        return x.copy_(_as_operations(x, chain, slots, Keep.INPUT))
    return _in_place(x, chain, slots)


def prepare_rotation(y: Tensor, rotations: Rotations, slots: Tensor | None = None) -> PreparedRotation | None:
    """`rotate_` of tensors like y, made ready to be called many times; None where that would win nothing."""
    chain = as_chain(rotations)
    check(y, chain, slots)
    return prepare_checked(y, chain, slots)


def prepare_checked(y: Tensor, chain: Chain, slots: Tensor | None) -> PreparedRotation | None:
    """As `prepare_rotation`, of what is known to fit together; None too where `rotate_` may not be used."""
    is_memory, needs_gradient, _ = _seen(y, chain)
    if needs_gradient or not is_memory:
        return None
    implementation = chosen(y.device, y.dtype, chain[0].direct.dtype)
    return implementation.prepare(turns_of(y, chain, slots), tuple(slots.shape) if slots is not None else (), y)


def _in_place(x: Tensor, chain: Chain, slots: Tensor | None) -> Tensor:
    turned(x, turns_of(x, chain, slots), in_place=True)
    if not x.is_inference():  # so that autograd sees the change of what it saved
        torch.autograd.graph.increment_version(x)
    return x


def _as_operations(x: Tensor, chain: Chain, slots: Tensor | None, keep: Keep) -> Tensor:
    """The same as operations that torch sees: for compilers, tracers, modes of torch and tensors made of tensors."""
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


def _keep(keep: Keep | str) -> Keep:
    try:
        return keep if isinstance(keep, Keep) else Keep(keep)
    except ValueError:
        raise ConfigError(f"got keep={keep!r}; wanted 'copy', 'input' or 'output'") from None


def is_looked_on() -> bool:
    """Whether anything of torch looks on, such as tracers, transforms and modes, or an implementation is asked for."""
    return _is_looked_on() or asked_for() is not None


def _is_looked_on() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _seen(x: Tensor, chain: Chain) -> tuple[bool, bool, list[Tensor]]:
    """Whether all is memory and nothing else, with nothing of torch looking on; whether autograd wants to know; the vectors."""
    is_memory, needs_gradient = type(x) in PLAIN and not _is_looked_on(), x.requires_grad
    vectors: list[Tensor] = []
    for table in chain:
        direct, cross = table.direct, table.cross
        vectors += (direct, cross)
        is_memory = is_memory and type(direct) in PLAIN and type(cross) in PLAIN
        needs_gradient = needs_gradient or direct.requires_grad or cross.requires_grad
    return is_memory, needs_gradient and torch.is_grad_enabled(), vectors


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
