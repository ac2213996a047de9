"""The operations as tracers and compilers see them: schema, fake kernel and gradient.

    roadie::rotate_rows(x, direct, cross, slots, sizes, group_size, keep_output) -> z
    roadie::rotate_rows_backward(grad, kept, direct, cross, slots, sizes, group_size, want_x) -> (grad_x, own, partner)

torch.compile, AOTAutograd, activation checkpointing and FSDP see these two and nothing inside them. One tensor of the
batch's size is kept for backward, the input or the output, in its own dtype; none where direct and cross need no gradient.

**What is kept** is said by `keep_output`, a constant of the graph; how it is kept, by `roadie.kernels.keeping`. With
``M = sum of g kept^T`` a pair (the sums own and partner), the gradient of the block R is M where the input was kept,
and ``M R^-T`` where the output was, since ``output = R input``. The solve costs nothing a row; its error grows with the
condition number of R (1 in road_1), and R must not be singular.

Legend: x ``[..., D]``, T rows of x, S slots.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from roadie.errors import KernelError
from roadie.kernels.choice import chosen
from roadie.kernels.eager import of_kept_input, of_kept_output
from roadie.kernels.keeping import remember_for_tracers, saved_tensors, watch
from roadie.kernels.step import matrix, row_rotations, turned
from roadie.kernels.table import RotationTable

# What is kept alive here stays registered.
_library = Library("roadie", "DEF")
_library.define(
    "rotate_rows(Tensor x, Tensor direct, Tensor cross, Tensor? slots, Tensor? sizes, int group_size, "
    "bool keep_output) -> Tensor"
)
_library.define(
    "rotate_rows_backward(Tensor grad, Tensor? kept, Tensor direct, Tensor cross, Tensor? slots, Tensor? sizes, "
    "int group_size, bool want_x) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor,
    direct: Tensor,
    cross: Tensor,
    slots: Tensor | None,
    sizes: Tensor | None,
    group_size: int,
    keep_output: bool = False,
) -> Tensor:
    """R x in new memory, without gradient: the operation's kernel on every device."""
    table = RotationTable(direct, cross, group_size if sizes is None else sizes)
    return turned(x, (row_rotations(x, table, slots),))


def _backward(
    grad: Tensor,
    kept: Tensor | None,
    direct: Tensor,
    cross: Tensor,
    slots: Tensor | None,
    sizes: Tensor | None,
    group_size: int,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """R^T grad (empty where not wanted) and the sums own and partner ``[S, D]`` (empty where nothing was kept)."""
    grad_x, own, partner = _empty_gradients(grad, kept, direct, want_x)
    if not grad.numel() or grad.is_meta:
        return grad_x, own.zero_(), partner.zero_()
    turns = row_rotations(grad, RotationTable(direct, cross, group_size if sizes is None else sizes), slots)
    rows, into = matrix(grad), grad_x.view(-1, grad.shape[-1]) if want_x else None
    implementation = chosen(grad.device, grad.dtype, direct.dtype)
    if kept is None:
        implementation.backward(rows, None, into, turns, None, None)
    else:
        implementation.backward(rows, matrix(kept), into, turns, own, partner)
    return grad_x, own, partner


def _empty_gradients(grad: Tensor, kept: Tensor | None, direct: Tensor, want_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `_backward` gives."""
    wide = torch.float64 if torch.float64 in (grad.dtype, direct.dtype) else torch.float32
    grad_x = torch.empty(grad.shape if want_x else (0,), dtype=grad.dtype, device=grad.device)
    own = torch.empty(direct.shape if kept is not None else (0,), dtype=wide, device=grad.device)
    return grad_x, own, torch.empty_like(own)


_library.impl("rotate_rows", _forward, "CompositeExplicitAutograd")
_library.impl("rotate_rows_backward", _backward, "CompositeExplicitAutograd")


@register_fake("roadie::rotate_rows", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("roadie::rotate_rows_backward", lib=_library)
def _(
    grad: Tensor, kept: Tensor | None, direct: Tensor, cross: Tensor, slots: Any, sizes: Any, size: int, want_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(grad, kept, direct, want_x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, direct, cross, slots, sizes, ctx.group_size, ctx.keep_output = inputs
    needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    kept = (output if ctx.keep_output else x) if needed else None
    ctx.save_for_backward(kept, direct, cross, slots, sizes)
    if kept is not None:
        watch(ctx, kept)
        remember_for_tracers(ctx, kept, direct, cross, slots, sizes)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What compilers see of the gradient."""
    kept, direct, cross, slots, sizes = saved_tensors(ctx)
    grad_x, own, partner = torch.ops.roadie.rotate_rows_backward(
        grad, kept, direct, cross, slots, sizes, ctx.group_size, ctx.needs_input_grad[0]
    )
    of_table: tuple[Tensor | None, Tensor | None] = (None, None)
    if kept is not None:
        size = ctx.group_size if sizes is None else sizes.unsqueeze(-1)
        solve = of_kept_output if ctx.keep_output else of_kept_input
        grad_direct, grad_cross = solve(own, partner, direct, cross, size)
        of_table = grad_direct.to(direct.dtype), grad_cross.to(cross.dtype)
    return grad_x if ctx.needs_input_grad[0] else None, *of_table, *(None,) * 4


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise KernelError(
        "got a second derivative of the compiled operation; it has first derivatives; run the model in eager mode, where "
        "second derivatives work"
    )


register_autograd("roadie::rotate_rows", _gradients, setup_context=_keep, lib=_library)
# Without it torch would warn, and leave this part of a second derivative out.
register_autograd("roadie::rotate_rows_backward", _no_second_derivative, lib=_library)
