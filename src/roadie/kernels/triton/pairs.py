"""Device functions that the kernels share: reading and writing the pairs of a tile, turning them, and their gradients.

Legend: rows ``[ROWS, 1]`` pointers to the first column of each row, P = PAIRS of the tile, H = half a group.

A tile is `PAIRS` pairs wide, counted from `block * PAIRS`: pair p is columns ``p // H * 2H + p % H`` and H further on.
Two ways to read it. Where SPLIT is H (small powers of two), not 0, the 2P columns are loaded as they lie in memory and parted in
registers. Otherwise each member has a load of its own: runs of H neighbours, which the compiler turns into wide loads
where H is a constant; for other H the second load hits the cache lines of the first.
"""

import triton
import triton.language as tl


@triton.jit
def first_columns(pair: tl.tensor, half: tl.tensor) -> tl.tensor:
    """The column of each pair's first member; the second is `half` further on."""
    return pair // half * (2 * half) + pair % half


@triton.jit
def load_pairs(
    rows: tl.tensor,
    row_mask: tl.tensor,
    block: tl.tensor,
    num_pairs: tl.tensor,
    half: tl.tensor,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second members of the tile's pairs, ``[ROWS, P]`` each; 0 outside the matrix."""
    if SPLIT > 0:
        column = block * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
        whole = tl.load(rows + column, mask=row_mask & (column < 2 * num_pairs), other=0)
        groups = tl.reshape(whole, [whole.shape[0], PAIRS // SPLIT, 2, SPLIT])
        first, second = tl.split(tl.permute(groups, [0, 1, 3, 2]))
        first = tl.reshape(first, [whole.shape[0], PAIRS])
        second = tl.reshape(second, [whole.shape[0], PAIRS])
    else:
        pair = block * PAIRS + tl.arange(0, PAIRS)[None, :]
        column = first_columns(pair, half)
        mask = row_mask & (pair < num_pairs)
        first = tl.load(rows + column, mask=mask, other=0)
        second = tl.load(rows + column + half, mask=mask, other=0)
    return first, second


@triton.jit
def store_pairs(
    rows: tl.tensor,
    row_mask: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    block: tl.tensor,
    num_pairs: tl.tensor,
    half: tl.tensor,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Writes both members ``[ROWS, P]`` where `load_pairs` reads them; they have the dtype of the memory."""
    if SPLIT > 0:
        column = block * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
        first = tl.reshape(first, [first.shape[0], PAIRS // SPLIT, SPLIT])
        second = tl.reshape(second, [second.shape[0], PAIRS // SPLIT, SPLIT])
        groups = tl.join(first, second)
        whole = tl.reshape(tl.permute(groups, [0, 1, 3, 2]), [first.shape[0], 2 * PAIRS])
        tl.store(rows + column, whole, mask=row_mask & (column < 2 * num_pairs))
    else:
        pair = block * PAIRS + tl.arange(0, PAIRS)[None, :]
        column = first_columns(pair, half)
        mask = row_mask & (pair < num_pairs)
        tl.store(rows + column, first, mask=mask)
        tl.store(rows + column + half, second, mask=mask)


@triton.jit
def turn(
    first: tl.tensor,
    second: tl.tensor,
    direct1: tl.tensor,
    cross1: tl.tensor,
    direct2: tl.tensor,
    cross2: tl.tensor,
    TRANSPOSED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """R (first, second), or R^T (first, second), pair by pair, in the dtype of the operands (float32)."""
    if TRANSPOSED:
        turned1 = direct1 * first + cross2 * second
        turned2 = direct2 * second - cross1 * first
    else:
        turned1 = direct1 * first - cross1 * second
        turned2 = direct2 * second + cross2 * first
    return turned1, turned2


@triton.jit
def load_turn(
    direct: tl.tensor,
    cross: tl.tensor,
    slot: tl.tensor,
    block: tl.tensor,
    num_pairs: tl.tensor,
    half: tl.tensor,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """direct1, cross1, direct2, cross2 of one slot, ``[1, P]`` each, in float32."""
    offset = tl.full([1, 1], 0, tl.int64) + slot.to(tl.int64) * (2 * num_pairs)
    everywhere = offset >= 0
    direct1, direct2 = load_pairs(direct + offset, everywhere, block, num_pairs, half, PAIRS, SPLIT)
    cross1, cross2 = load_pairs(cross + offset, everywhere, block, num_pairs, half, PAIRS, SPLIT)
    return direct1.to(tl.float32), cross1.to(tl.float32), direct2.to(tl.float32), cross2.to(tl.float32)


@triton.jit
def solved(
    own1: tl.tensor,
    own2: tl.tensor,
    partner1: tl.tensor,
    partner2: tl.tensor,
    direct1: tl.tensor,
    cross1: tl.tensor,
    direct2: tl.tensor,
    cross2: tl.tensor,
    OF_OUTPUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The gradients of direct1, cross1, direct2 and cross2, from sums over rows of the input, or of the output.

    With M = sum of g input^T a pair, grad_direct is M's diagonal, grad_cross1 = -M12 and grad_cross2 = M21. Sums over the output
    are M R^T instead, since output = R input; M is then (M R^T) R^-T, in closed form.
    """
    of_direct1 = own1
    of_direct2 = own2
    of_cross1 = -partner1
    of_cross2 = partner2
    if OF_OUTPUT:
        determinant = direct1 * direct2 + cross1 * cross2
        is_unused = (own1 == 0) & (own2 == 0) & (partner1 == 0) & (partner2 == 0)
        determinant = tl.where((determinant == 0) & is_unused, 1.0, determinant)
        of_direct1 = tl.div_rn(own1 * direct2 + partner1 * cross1, determinant)
        of_direct2 = tl.div_rn(own2 * direct1 - partner2 * cross2, determinant)
        of_cross1 = tl.div_rn(own1 * cross2 - partner1 * direct1, determinant)
        of_cross2 = tl.div_rn(own2 * cross1 + partner2 * direct2, determinant)
    return of_direct1, of_cross1, of_direct2, of_cross2
