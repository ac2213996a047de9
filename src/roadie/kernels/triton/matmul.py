"""A linear layer whose result is rotated before it is written: R (W x + b) without another pass over the batch.

A program makes a tile of rows and PAIRS. The members of a pair are G / 2 columns apart, so it keeps two accumulators, one for
the first members and one for the second, and multiplies x by two sets of W's rows. Both members of a pair then lie in
the same place of the same thread, and the rotation moves nothing between threads. Since the columns of a tile are counted
in pairs, any group size fits that all slots share.

Arithmetic in float32 from the products on, one rounding; float32 operands are not cut to TF32. Here the compiler may
contract a product and a sum, which the matrix units do anyway.

Legend: T rows, K in features, D out features, B runs of `repeat` rows, P pairs of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from roadie.errors import KernelError
from roadie.kernels.contract import RowRotations
from roadie.kernels.triton import runtime, tiles
from roadie.kernels.triton.launches import current_device
from roadie.kernels.triton.pairs import first_columns, load_turn, store_pairs, turn


class ProductTile(NamedTuple):
    """rows x pairs (2 pairs columns) of the result, `depth` of K at a time; the rest is for the compiler."""

    rows: int
    pairs: int
    depth: int
    warps: int
    stages: int


BAND = 8  # row blocks that are worked on together, so that their rows of W are still in the second-level cache


@triton.jit
def linear_rotate_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    slots: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    num_rows: tl.tensor,
    num_pairs: tl.tensor,
    in_features: tl.tensor,
    repeat: tl.tensor,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MIXED: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Grid: tiles of the result. x ``[T, K]``, weight ``[D, K]``, bias ``[D]``, out ``[T, D]`` contiguous."""
    row_blocks = tl.cdiv(num_rows, ROWS)
    in_band = BAND * tl.cdiv(num_pairs, PAIRS)
    band_start = tl.program_id(0) // in_band * BAND
    height = tl.minimum(row_blocks - band_start, BAND)
    row_block = band_start + tl.program_id(0) % in_band % height
    block = tl.program_id(0) % in_band // height

    row = row_block * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None]
    # Rows and pairs beyond the end compute the last ones again, so that the loads need no mask; they are not stored.
    row = tl.minimum(row, num_rows - 1).to(tl.int64)
    pair = tl.minimum(block * PAIRS + tl.arange(0, PAIRS), num_pairs - 1)
    column = first_columns(pair, HALF)
    depth = tl.arange(0, DEPTH)
    x_here = x + row[:, None] * x_stride + depth[None, :]
    weight1 = weight + column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    weight2 = weight + (column + HALF).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    h1 = tl.zeros([ROWS, PAIRS], tl.float32)
    h2 = tl.zeros([ROWS, PAIRS], tl.float32)
    for start in range(0, in_features, DEPTH):
        if WHOLE_DEPTH:
            x_tile = tl.load(x_here)
            w1 = tl.load(weight1)
            w2 = tl.load(weight2)
        else:
            left = in_features - start
            x_tile = tl.load(x_here, mask=depth[None, :] < left, other=0)
            w1 = tl.load(weight1, mask=depth[:, None] < left, other=0)
            w2 = tl.load(weight2, mask=depth[:, None] < left, other=0)
        if WIDEN:
            x_tile, w1, w2 = x_tile.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32)
        h1 = tl.dot(x_tile, w1, h1, input_precision="ieee")
        h2 = tl.dot(x_tile, w2, h2, input_precision="ieee")
        x_here += DEPTH
        weight1 += DEPTH
        weight2 += DEPTH
    if HAS_BIAS:
        h1 += tl.load(bias + column)[None, :].to(tl.float32)
        h2 += tl.load(bias + column + HALF)[None, :].to(tl.float32)

    slot = tl.full([1, 1], 0, tl.int64)
    if MIXED:
        slot = tl.load(slots + row // repeat)[:, None]
    used = tl.maximum(slot, 0)
    direct1, cross1, direct2, cross2 = load_turn(direct, cross, used, block, num_pairs, HALF, PAIRS, SPLIT)
    z1, z2 = turn(h1, h2, direct1, cross1, direct2, cross2, False)
    z1 = tl.where(slot < 0, h1, z1).to(out.dtype.element_ty)
    z2 = tl.where(slot < 0, h2, z2).to(out.dtype.element_ty)
    store_pairs(out + row[:, None] * (2 * num_pairs), inside, z1, z2, block, num_pairs, HALF, PAIRS, SPLIT)


def linear_rotate(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> Tensor:
    """``R (W x + b)``, each row by its slot: x ``[T, K]``, weight ``[D, K]`` and the result ``[T, D]`` in one dtype.

    bias: ``[D]`` or None; x and weight have stride 1 along K; the group size must be the same for all slots. No gradient.
    Raises `KernelError` for tensors that do not fit, and where Triton cannot run.
    """
    _check(x, weight, bias, turns)
    num_rows, width = x.shape[0], weight.shape[0]
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        with current_device(x.device):
            _launch(x, weight, bias, out, turns)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, turns: RowRotations) -> None:
    num_rows, in_features = x.shape
    num_pairs = out.shape[1] // 2
    tile = product_tile(num_rows, x.dtype)
    half, split = tiles.halves(turns.group_size, uniform=True)
    grid = (tiles.cdiv(num_rows, tile.rows) * tiles.cdiv(num_pairs, tile.pairs),)
    linear_rotate_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,  # stand-ins, here and for the slots: never read
        out,
        turns.direct,
        turns.cross,
        turns.direct if turns.slots is None else turns.slots,
        x.stride(0),
        weight.stride(0),
        num_rows,
        num_pairs,
        in_features,
        turns.repeat,
        HALF=half,
        SPLIT=split,
        HAS_BIAS=bias is not None,
        MIXED=turns.slots is not None,
        WHOLE_DEPTH=in_features % tile.depth == 0,
        # The interpreter multiplies bfloat16 bit patterns as integers.
        WIDEN=runtime.is_interpreted(),
        BAND=BAND,
        ROWS=tile.rows,
        PAIRS=tile.pairs,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def product_tile(num_rows: int, dtype: torch.dtype) -> ProductTile:
    """The tile for so many rows.

    Few rows are bound by reading W once: small tiles, many programs, long stretches of K. Many rows are bound by the matrix
    units. float32 has none, and its operands take twice the room. Measured on no device yet: these are the sizes that fit
    the shared memory (96 KiB for the largest) of compute capability 8.0 and newer; chosen by hand, not by timing at run
    time, which would be lost on the first call and impossible while a CUDA graph is recorded.
    """
    stages = 2 if torch.version.hip is not None else 3
    if num_rows <= 16:
        return ProductTile(16, 16, 64 if dtype == torch.float32 else 128, 4, stages)
    if num_rows <= 256 or dtype == torch.float32:
        return ProductTile(64, 32, 32 if dtype == torch.float32 else 64, 4, stages)
    return ProductTile(128, 64, 64, 8, stages)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> None:
    reason = runtime.refusal_of(x.device, x.dtype, turns.direct.dtype) or _misfit(x, weight, bias, turns)
    if reason is not None:
        raise KernelError(f"linear_rotate cannot run: {reason}")


def _misfit(x: Tensor, weight: Tensor, bias: Tensor | None, turns: RowRotations) -> str | None:
    width = turns.direct.shape[1]
    if x.dim() != 2 or weight.shape != (width, x.shape[1]) or (bias is not None and bias.shape != (width,)):
        return (
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)} and a "
            f"table of {width} outputs; wanted x [T, K], weight [D, K], bias [D] or None, and a table [S, D]"
        )
    if x.dtype != weight.dtype:
        return f"got x in {x.dtype} and a weight in {weight.dtype}; wanted one dtype; quantised weights need rotate"
    if (x.shape[1] > 1 and x.stride(1) != 1) or (x.shape[1] > 1 and weight.stride(1) != 1):
        return f"got strides {x.stride()} of x and {weight.stride()} of the weight; wanted 1 along K; use .contiguous()"
    if turns.sizes is not None:
        return "got a group size for each slot; wanted one for all, because W's rows are taken in pairs; use rotate"
    if turns.group_size < 2 or turns.group_size % 2 or width % turns.group_size:
        return f"got group_size={turns.group_size} for {width} outputs; wanted an even number that divides them"
    return None
