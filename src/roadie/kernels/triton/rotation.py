"""R x and R^T x, in new memory or in place, for one rotation or for rows of many slots.

A program works on rows of ONE slot: the batch is `num_routed` runs of `repeat` rows, and rows are cut within a run. So the
slot, its group size and its table are fetched once a program. A batch of one slot is a single run of all rows.

In place, a barrier stands between a program's loads and its stores: a thread may store a pair's member before another
thread of the program has loaded it, because the compiler may give loads and stores different layouts. Programs share no
pairs, so nothing else is needed. Rows of the base are not touched.

Rounding: `enable_fp_fusion=False` at the launch keeps each product and sum rounded by itself.
"""

import triton
import triton.language as tl
from torch import Tensor

from roadie.kernels.contract import RowRotations
from roadie.kernels.triton import tiles
from roadie.kernels.triton.launches import Launch, Launches
from roadie.kernels.triton.pairs import load_pairs, load_turn, store_pairs, turn


@triton.jit
def rotate_rows(
    x: tl.tensor,
    out: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    slot: tl.tensor,
    begin: tl.tensor,
    first_row: tl.tensor,
    num_rows: tl.tensor,
    block: tl.tensor,
    num_pairs: tl.tensor,
    half: tl.tensor,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """The rows of a program: of the run at row `begin`, from first_row on, as far as num_rows of the run."""
    is_base = slot < 0
    used = tl.maximum(slot, 0)
    direct1, cross1, direct2, cross2 = load_turn(direct, cross, used, block, num_pairs, half, PAIRS, SPLIT)
    for step in range(STEPS):
        row_of_run = first_row + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = row_of_run < num_rows
        row = begin + row_of_run
        x1, x2 = load_pairs(x + row * x_stride, mask, block, num_pairs, half, PAIRS, SPLIT)
        z1, z2 = turn(x1.to(tl.float32), x2.to(tl.float32), direct1, cross1, direct2, cross2, TRANSPOSED)
        # Chosen after rounding, so that rows of the base are copied bit for bit, NaN included.
        z1 = tl.where(is_base, x1, z1.to(x1.dtype))
        z2 = tl.where(is_base, x2, z2.to(x2.dtype))
        if IN_PLACE:
            tl.debug_barrier()
        store_pairs(out + row * out_stride, mask, z1, z2, block, num_pairs, half, PAIRS, SPLIT)


@triton.jit(do_not_specialize=["repeat"])  # or each number of rows would compile it again
def rotate_kernel(
    x: tl.tensor,
    out: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    slots: tl.tensor,
    sizes: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    num_pairs: tl.tensor,
    repeat: tl.tensor,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    LIKELY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MIXED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Grid: (runs times row blocks of a run, column blocks). x, out ``[T, D]``; slots ``[B]``.

    HALF: G / 2; 0: from sizes, where LIKELY is the one that rows are read fast with, by wide loads.
    """
    row_blocks = tl.cdiv(repeat, ROWS * STEPS)
    routed = tl.program_id(0) // row_blocks
    first_row = tl.program_id(0) % row_blocks * (ROWS * STEPS)
    block = tl.program_id(1)
    slot = tl.full([], 0, tl.int64)
    if MIXED:
        slot = tl.load(slots + routed)
    num_rows = repeat
    if IN_PLACE:
        num_rows = tl.where(slot < 0, 0, repeat)
    begin = routed.to(tl.int64) * repeat
    if HALF > 0:
        rotate_rows(
            x, out, direct, cross, x_stride, out_stride, slot, begin, first_row, num_rows, block, num_pairs, HALF,
            SPLIT, TRANSPOSED, IN_PLACE, ROWS, PAIRS, STEPS,
        )  # fmt: skip
    else:
        half = tl.load(sizes + tl.maximum(slot, 0)) // 2
        if half == LIKELY:
            rotate_rows(
                x, out, direct, cross, x_stride, out_stride, slot, begin, first_row, num_rows, block, num_pairs, LIKELY,
                SPLIT, TRANSPOSED, IN_PLACE, ROWS, PAIRS, STEPS,
            )  # fmt: skip
        else:
            rotate_rows(
                x, out, direct, cross, x_stride, out_stride, slot, begin, first_row, num_rows, block, num_pairs, half,
                SPLIT, TRANSPOSED, IN_PLACE, ROWS, PAIRS, STEPS,
            )  # fmt: skip


launches = Launches(rotate_kernel)


def tensors_of(turns: RowRotations) -> tuple[Tensor, ...]:
    """What comes after x and out: direct, cross, slots and sizes, with stand-ins where there is none, which are never read."""
    direct, cross, slots, _, sizes, _ = turns
    return direct, cross, direct if slots is None else slots, direct if sizes is None else sizes


def launch_of(x: Tensor, out: Tensor, turns: RowRotations, *, transposed: bool = False) -> Launch:
    """For x and out ``[T, D]``."""
    num_rows, width = x.shape
    num_pairs = width // 2
    num_routed = 1 if turns.slots is None else turns.slots.shape[0]
    repeat = num_rows if turns.slots is None else turns.repeat
    tile = tiles.rotate_tile(num_routed, repeat, num_pairs)
    half, split = tiles.halves(turns.group_size, uniform=turns.sizes is None)
    return Launch(
        (num_routed * tiles.cdiv(repeat, tile.rows * tile.steps), tiles.cdiv(num_pairs, tile.pairs)),
        (x.stride(0), out.stride(0), num_pairs, repeat),
        {
            "HALF": half,
            "SPLIT": split,
            "LIKELY": tiles.LIKELY_HALF,
            "TRANSPOSED": transposed,
            "MIXED": turns.slots is not None,
            "IN_PLACE": x.data_ptr() == out.data_ptr(),
            "ROWS": tile.rows,
            "PAIRS": tile.pairs,
            "STEPS": tile.steps,
        },
        {"num_warps": tile.warps, "enable_fp_fusion": False},
    )


def rotate(x: Tensor, out: Tensor, turns: RowRotations, *, transposed: bool = False) -> None:
    """Writes R x, or R^T x, into `out`; x and out ``[T, D]``, out may be x."""
    rows = None if turns.slots is None else (turns.slots.shape[0], turns.repeat)
    kind = turns.group_size, turns.sizes is None, transposed, x.data_ptr() == out.data_ptr()
    facts = x.shape, x.stride(0), out.stride(0), rows, kind
    launches((x, out, *tensors_of(turns)), facts, lambda: launch_of(x, out, turns, transposed=transposed))
