"""From sums over rows to the gradients of direct and cross: one launch for what would be a dozen, each of a table's size.

Legend: S slots, D out features, P pairs of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from roadie.kernels.contract import RowRotations
from roadie.kernels.triton import tiles
from roadie.kernels.triton.launches import Launch, Launches
from roadie.kernels.triton.pairs import load_pairs, load_turn, solved, store_pairs

PAIRS = 256


@triton.jit
def gradient_kernel(
    own: tl.tensor,
    partner: tl.tensor,
    direct: tl.tensor,
    cross: tl.tensor,
    sizes: tl.tensor,
    own_stride: tl.tensor,
    partner_stride: tl.tensor,
    num_pairs: tl.tensor,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    OF_OUTPUT: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Grid: (slots, column blocks). own becomes grad_direct and partner grad_cross, ``[S, D]`` float32."""
    slot = tl.full([1, 1], 0, tl.int64) + tl.program_id(0)
    block = tl.program_id(1)
    everywhere = slot >= 0
    half = HALF
    if HALF == 0:
        half = tl.load(sizes + tl.program_id(0)) // 2
    own_row = own + slot * own_stride
    partner_row = partner + slot * partner_stride
    own1, own2 = load_pairs(own_row, everywhere, block, num_pairs, half, PAIRS, SPLIT)
    partner1, partner2 = load_pairs(partner_row, everywhere, block, num_pairs, half, PAIRS, SPLIT)
    direct1, cross1, direct2, cross2 = load_turn(direct, cross, slot, block, num_pairs, half, PAIRS, SPLIT)
    of_direct1, of_cross1, of_direct2, of_cross2 = solved(
        own1, own2, partner1, partner2, direct1, cross1, direct2, cross2, OF_OUTPUT
    )
    tl.debug_barrier()  # in place: see `rotation`
    store_pairs(own_row, everywhere, of_direct1, of_direct2, block, num_pairs, half, PAIRS, SPLIT)
    store_pairs(partner_row, everywhere, of_cross1, of_cross2, block, num_pairs, half, PAIRS, SPLIT)


_launches = Launches(gradient_kernel)


def sums_to_gradients(own: Tensor, partner: Tensor, turns: RowRotations, of_output: bool) -> None:
    """Turns own and partner ``[S, D]`` float32 into the gradients of direct and cross, in place."""
    num_slots, width = own.shape
    sizes, strides = turns.sizes, (own.stride(0), partner.stride(0))

    def launch() -> Launch:
        half, split = tiles.halves(turns.group_size, uniform=sizes is None)
        return Launch(
            (num_slots, tiles.cdiv(width // 2, PAIRS)),
            (*strides, width // 2),
            {"HALF": half, "SPLIT": split, "OF_OUTPUT": of_output, "PAIRS": PAIRS},
            {"num_warps": 1, "enable_fp_fusion": False},
        )

    tensors = (
        own,
        partner,
        turns.direct,
        turns.cross,
        turns.direct if sizes is None else sizes,
    )  # a stand-in: never read
    _launches(tensors, (own.shape, strides, turns.group_size, sizes is None, of_output), launch)
