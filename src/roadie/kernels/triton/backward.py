"""R^T g together with the sums over rows, which share the reading of g; deterministic, without atomic additions.

`backward_kernel`: a program takes one task (at most ROWS * STEPS rows of one slot) and a block of columns. It adds up its
rows in registers and leaves one row of partial sums, own and partner, in scratch. `reduce_kernel`: a program takes a slot
and a block of columns and adds the slot's partial sums in their order; slots that no row uses get 0. Whichever comes last makes
the gradients of direct and cross of the sums, where these are wanted.

Scratch: ``[M, 2, D]`` float32 with M <= T / N + min(B, S + 1) tasks of N = ROWS * STEPS rows (`tasks`): in bytes at most own
and partner together, and a row of each for the base, and 8 / N of a float32 batch's (all of it for N = 8, up to 256 rows; a
quarter for N = 32, up to 1024; 1/8 for N = 64; 1/16 for N = 128, from 8193 rows). One task of one slot needs neither scratch
nor a second kernel.

Legend: T rows, B runs of `repeat` rows, S slots, M tasks, D out features, P pairs of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from roadie.kernels.contract import SUMS, RowRotations
from roadie.kernels.triton import tiles
from roadie.kernels.triton.launches import Launch, Launches
from roadie.kernels.triton.pairs import load_pairs, load_turn, solved, store_pairs, turn
from roadie.kernels.triton.tasks import tasks_of

TASKS_AT_ONCE = 16
PAIRS = 64  # of a tile of `reduce_kernel`


@triton.jit(do_not_specialize=["num_rows", "num_slots", "repeat"])
def backward_kernel(
    grad: tl.tensor,
    kept: tl.tensor,
    grad_x: tl.tensor,
    own: tl.tensor,
    partner: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    sizes: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    ends: tl.tensor,
    group: tl.tensor,
    grad_stride: tl.tensor,
    kept_stride: tl.tensor,
    grad_x_stride: tl.tensor,
    own_stride: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    num_pairs: tl.tensor,
    repeat: tl.tensor,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    MIXED: tl.constexpr,
    WANT_X: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
    SOLVE: tl.constexpr,
) -> None:
    """Grid: (tasks M, column blocks). grad, kept, grad_x ``[T, D]``; own, partner ``[M, D]``, rows own_stride apart.

    SOLVE: what is written there, as in `reduce_kernel`: more than sums where there is one task only.
    """
    # Rows are counted in 32 bits, which divide fast; only offsets need 64.
    task = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.full([], 0, tl.int64)
    first_row = task * (ROWS * STEPS)
    end_row = num_rows
    if MIXED:
        of_group = tl.load(group + task)
        exists = of_group <= num_slots
        tasks_before = tl.load(ends + of_group - 1, mask=of_group > 0, other=0).to(tl.int32)
        first_row = tl.load(bounds + of_group, mask=exists, other=0).to(tl.int32) * repeat
        first_row += (task - tasks_before) * (ROWS * STEPS)
        end_row = tl.load(bounds + of_group + 1, mask=exists, other=0).to(tl.int32) * repeat
        slot = tl.where(exists, of_group - 1, -1)
    # A task that does not exist has no rows: its end is 0, and its first row is not before that.
    end_row = tl.minimum(end_row, first_row + ROWS * STEPS)
    is_base = slot < 0
    used = tl.maximum(slot, 0)
    half = HALF
    if HALF == 0:
        half = tl.load(sizes + used) // 2
    direct1, cross1, direct2, cross2 = load_turn(direct, cross, used, block, num_pairs, half, PAIRS, SPLIT)
    own1 = tl.zeros([ROWS, PAIRS], tl.float32)
    own2 = tl.zeros([ROWS, PAIRS], tl.float32)
    partner1 = tl.zeros([ROWS, PAIRS], tl.float32)
    partner2 = tl.zeros([ROWS, PAIRS], tl.float32)
    for start in range(first_row, end_row, ROWS):
        virtual = start + tl.arange(0, ROWS)[:, None]
        mask = virtual < end_row
        row = virtual.to(tl.int64)
        if MIXED:
            row = tl.load(order + virtual // repeat, mask=mask, other=0) * repeat + virtual % repeat
        raw1, raw2 = load_pairs(grad + row * grad_stride, mask, block, num_pairs, half, PAIRS, SPLIT)
        k1, k2 = load_pairs(kept + row * kept_stride, mask, block, num_pairs, half, PAIRS, SPLIT)
        g1, g2, k1, k2 = raw1.to(tl.float32), raw2.to(tl.float32), k1.to(tl.float32), k2.to(tl.float32)
        own1 += g1 * k1
        own2 += g2 * k2
        partner1 += g1 * k2  # the kept value of the other member
        partner2 += g2 * k1
        if WANT_X:
            x1, x2 = turn(g1, g2, direct1, cross1, direct2, cross2, True)
            x1 = tl.where(is_base, raw1, x1.to(raw1.dtype))
            x2 = tl.where(is_base, raw2, x2.to(raw2.dtype))
            store_pairs(grad_x + row * grad_x_stride, mask, x1, x2, block, num_pairs, half, PAIRS, SPLIT)
    line = tl.full([1, 1], 0, tl.int64) + task.to(tl.int64) * own_stride
    wanted = tl.full([1, 1], 0, tl.int64) + slot >= 0
    own1, own2 = tl.sum(own1, 0)[None, :], tl.sum(own2, 0)[None, :]
    partner1, partner2 = tl.sum(partner1, 0)[None, :], tl.sum(partner2, 0)[None, :]
    if SOLVE > 0:
        own1, partner1, own2, partner2 = solved(
            own1, own2, partner1, partner2, direct1, cross1, direct2, cross2, SOLVE == 2
        )
    store_pairs(own + line, wanted, own1, own2, block, num_pairs, half, PAIRS, SPLIT)
    store_pairs(partner + line, wanted, partner1, partner2, block, num_pairs, half, PAIRS, SPLIT)


@triton.jit(do_not_specialize=["num_tasks"])
def reduce_kernel(
    partial: tl.tensor,
    own: tl.tensor,
    partner: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    sizes: tl.tensor,
    ends: tl.tensor,
    own_stride: tl.tensor,
    partner_stride: tl.tensor,
    num_tasks: tl.tensor,
    num_pairs: tl.tensor,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    MIXED: tl.constexpr,
    TASKS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOLVE: tl.constexpr,
) -> None:
    """Grid: (slots, column blocks). partial ``[M, 2, D]`` float32; own, partner ``[S, D]``.

    SOLVE: 0 for sums; or the gradients of direct and cross, 1 from sums over the rotation's input, 2 over its output.
    """
    slot = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half = HALF
    if HALF == 0:
        half = tl.load(sizes + slot) // 2
    first = tl.full([], 0, tl.int64)
    end = tl.where(slot == 0, num_tasks, 0).to(tl.int64)
    if MIXED:
        first = tl.load(ends + slot)
        end = tl.load(ends + slot + 1)
    own1 = tl.zeros([TASKS, PAIRS], tl.float32)
    own2 = tl.zeros([TASKS, PAIRS], tl.float32)
    partner1 = tl.zeros([TASKS, PAIRS], tl.float32)
    partner2 = tl.zeros([TASKS, PAIRS], tl.float32)
    for start in range(first, end, TASKS):
        task = start + tl.arange(0, TASKS)[:, None].to(tl.int64)
        mask = task < end
        here = partial + task * (4 * num_pairs)
        a1, a2 = load_pairs(here, mask, block, num_pairs, half, PAIRS, SPLIT)
        b1, b2 = load_pairs(here + 2 * num_pairs, mask, block, num_pairs, half, PAIRS, SPLIT)
        own1 += a1
        own2 += a2
        partner1 += b1
        partner2 += b2
    own1, own2 = tl.sum(own1, 0)[None, :], tl.sum(own2, 0)[None, :]
    partner1, partner2 = tl.sum(partner1, 0)[None, :], tl.sum(partner2, 0)[None, :]
    if SOLVE > 0:
        direct1, cross1, direct2, cross2 = load_turn(direct, cross, slot, block, num_pairs, half, PAIRS, SPLIT)
        own1, partner1, own2, partner2 = solved(
            own1, own2, partner1, partner2, direct1, cross1, direct2, cross2, SOLVE == 2
        )
    line = tl.full([1, 1], 0, tl.int64) + slot
    everywhere = line >= 0
    store_pairs(own + line * own_stride, everywhere, own1, own2, block, num_pairs, half, PAIRS, SPLIT)
    store_pairs(partner + line * partner_stride, everywhere, partner1, partner2, block, num_pairs, half, PAIRS, SPLIT)


_launches, _reductions = Launches(backward_kernel, shared=1), Launches(reduce_kernel)


def backward_with_sums(
    grad: Tensor,
    kept: Tensor,
    grad_x: Tensor | None,
    turns: RowRotations,
    own: Tensor,
    partner: Tensor,
    solve: int = SUMS,
) -> None:
    """Writes R^T grad into `grad_x` (where wanted) and the sums over rows into own and partner ``[S, D]`` float32.

    solve: what is made of the sums; see `Implementation.backward`.
    """
    num_rows, width = grad.shape
    num_slots = len(own)
    tile = tiles.backward_tile(num_rows, width // 2)
    rows_a_task = tile.rows * tile.steps
    tasks = None if turns.slots is None else tasks_of(turns.slots, turns.repeat, num_slots, rows_a_task)
    num_tasks = tiles.cdiv(num_rows, rows_a_task) if tasks is None else tasks.number
    alone = tasks is None and num_tasks == num_slots == 1
    partial = None if alone else torch.empty(num_tasks, 2, width, dtype=torch.float32, device=grad.device)
    own_row, partner_row = (own, partner) if partial is None else (partial[:, 0], partial[:, 1])
    direct, sizes = turns.direct, turns.sizes
    # Stand-ins, which are never written, or read: for grad_x, sizes and tasks.
    into, of_slot, of_tasks = (
        grad if grad_x is None else grad_x,
        direct if sizes is None else sizes,
        tasks or (direct,) * 4,
    )
    strides = grad.stride(0), kept.stride(0), 0 if grad_x is None else grad_x.stride(0), own_row.stride(0)
    of_table = turns.group_size, sizes is None, tasks is not None, solve

    def launch() -> Launch:
        constants = {"MIXED": tasks is not None, "WANT_X": grad_x is not None}
        return Launch(
            (num_tasks, tiles.cdiv(width // 2, tile.pairs)),
            (*strides, num_rows, num_slots, width // 2, turns.repeat),
            {
                **_halves(turns),
                **constants,
                "ROWS": tile.rows,
                "PAIRS": tile.pairs,
                "STEPS": tile.steps,
                "SOLVE": solve if alone else SUMS,
            },
            {"num_warps": tile.warps, "enable_fp_fusion": False},
        )

    tensors = grad, kept, into, own_row, partner_row, direct, turns.cross, of_slot, *of_tasks
    _launches(tensors, (grad.shape, strides, num_tasks, num_slots, turns.repeat, grad_x is None, of_table), launch)
    if partial is not None:
        _reduce(partial, own, partner, turns, None if tasks is None else tasks.ends, of_table)


def _reduce(
    partial: Tensor, own: Tensor, partner: Tensor, turns: RowRotations, ends: Tensor | None, of_table: tuple[Any, ...]
) -> None:
    """own and partner of partial sums ``[M, 2, D]``; ends: of each slot's tasks, where rows have slots; of_table: as launched."""
    num_slots, num_tasks, half_width, solve = len(own), len(partial), own.shape[1] // 2, of_table[-1]

    def reduction() -> Launch:
        constants = {"MIXED": ends is not None, "TASKS": TASKS_AT_ONCE, "PAIRS": PAIRS, "SOLVE": solve}
        return Launch(
            (num_slots, tiles.cdiv(half_width, PAIRS)),
            (own.stride(0), partner.stride(0), num_tasks, half_width),
            {**_halves(turns), **constants},
            {"num_warps": 4, "enable_fp_fusion": False},
        )

    direct, sizes = turns.direct, turns.sizes
    stand_ins = direct if sizes is None else sizes, direct if ends is None else ends  # which are never read
    reduced = partial, own, partner, direct, turns.cross, *stand_ins
    _reductions(reduced, (own.shape, own.stride(0), partner.stride(0), num_tasks, of_table), reduction)


def _halves(turns: RowRotations) -> dict[str, int]:
    half, split = tiles.halves(turns.group_size, uniform=turns.sizes is None)
    return {"HALF": half, "SPLIT": split}
