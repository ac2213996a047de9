"""Rotations that are being trained: parameters, table and rotation as few steps of autograd.

Autograd would record a dozen small operations between theta, alpha and the table, and Python runs them slowly beside a
large layer (`roadie.kernels.cpu.prepared` says how slowly). Here they are one step, whose adjoint is
`rotation.parameter_gradients`; for one adapter, the usual case, the rotation is in the same step. For it a table is kept
until a training step changes the parameters, since gradient accumulation and activation checkpointing ask for it again.

Legend: y ``[..., D]``, S slots, n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roadie.kernels import Chain, Keep, RotationStep, RotationTable, saved_tensors, summed, to_save
from roadie.rotation import parameter_gradients
from roadie.tuner.table import PLAIN, SlotParameters, absent_in, build_table, by_kind, by_stage, stacked


def trained_chain(slots: Sequence[SlotParameters | None], out_features: int) -> Chain | None:
    """`build_chain` as one step of autograd for each table instead of a dozen."""
    stages = by_stage(slots)
    tables = [_trained_table(stage, out_features, absent_in(stages)) for stage in stages]
    return tuple(table for table in tables if table is not None) or None


def _trained_table(slots: Sequence[SlotParameters | None], out_features: int, absent: int) -> RotationTable | None:
    parameters = [tensor for slot in slots if slot is not None for tensor in slot[:2]]
    if not all(type(tensor) in PLAIN for tensor in parameters):
        return build_table(slots, out_features, absent=absent)
    with torch.no_grad():
        table = build_table(slots, out_features, absent=absent)
    if table is None:
        return None
    direct, cross = _TrainedTable.apply(table, tuple(slots), *parameters)
    return RotationTable(direct, cross, table.group_sizes)


class _TrainedTable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: RotationTable, slots: tuple[SlotParameters | None, ...], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.slots = slots
        ctx.save_for_backward(*parameters)  # to be told where they were changed since
        return table.direct.detach(), table.cross.detach()

    @staticmethod
    def backward(ctx: Any, grad_direct: Tensor, grad_cross: Tensor) -> tuple[Tensor | None, ...]:
        slots, _ = ctx.slots, ctx.saved_tensors  # asking for them checks that they were not changed since
        gradients: list[tuple[Tensor, Tensor] | None] = [None] * len(slots)
        for (variant, group_size), indices in by_kind(slots).items():
            rows = slice(None) if len(indices) == len(slots) else torch.tensor(indices, device=grad_direct.device)
            theta, alpha = stacked(slots, indices)
            of_kind = parameter_gradients(grad_direct[rows], grad_cross[rows], theta, alpha, variant, group_size)
            for index, *of_slot in zip(indices, *of_kind, strict=True):
                gradients[index] = (of_slot[0].to(theta.dtype), of_slot[1].to(alpha.dtype))
        return None, None, *(gradient for pair in gradients if pair is not None for gradient in pair)


def rotated_by_one(y: Tensor, slot: SlotParameters, table: RotationTable, keep: Keep, *, into_y: bool) -> Tensor:
    """R y for `slot`, of one rotation, whose table ``[1, D]`` is given, on plain tensors; differentiable in y, theta and alpha.

    keep: as `settled`; into_y: in place, for a y that nobody else holds; only where the output is kept.
    """
    z, _ = _RotatedByOne.apply(y, slot.theta, slot.alpha, RotationStep(table, None, keep), slot, into_y)
    return z


class _RotatedByOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, theta: Tensor, alpha: Tensor, step: RotationStep, slot: SlotParameters, into_y: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.step, ctx.variant, ctx.group_size = step, slot.variant, slot.size_of_one
        z = step.forward(y, into_y=into_y)
        if into_y:
            ctx.mark_dirty(y)
        kept = to_save(ctx, y, z, step.keep, into_x=into_y)
        ctx.save_for_backward(kept, theta, alpha)
        ctx.set_materialize_grads(False)
        return z, kept if step.keep is Keep.COPY else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_kept: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = summed(grad, of_kept)
        if grad is None:
            return (None,) * 6
        kept, theta, alpha = saved_tensors(ctx)
        step = ctx.step
        if torch.is_grad_enabled():  # create_graph=True: the table must depend on the parameters
            table = build_table([SlotParameters(theta, alpha, ctx.variant, ctx.group_size)], 0)
            assert table is not None
            step = RotationStep(table, None, step.keep)
        grad_y, *of_table = step.backward(grad, kept, want_y=ctx.needs_input_grad[0])
        direct, cross = (gradient[0] for gradient in of_table)
        of_theta, of_alpha = parameter_gradients(direct, cross, theta, alpha, ctx.variant, ctx.group_size)
        return grad_y, of_theta.to(theta.dtype), of_alpha.to(alpha.dtype), None, None, None
