"""How the work is cut into programs: a tile of rows and pairs, and how many such tiles of rows a program walks through.

The kernels are bound by memory. What that asks for:

- A program works on whole pairs, so that it reads both members once and needs nothing of any other program.
- A thread should move 16 bytes a load: 8 pairs a thread give that for both members in half precision.
- Four warps and 1024 pairs a program leave registers for many programs on a multiprocessor, and those hide the latency.
- The table's rows stay in registers while a program walks down the rows of the batch, so that tables in float32, twice as
  wide as the batch, are not fetched again for each tile; but only where enough programs are left to fill the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

PAIRS_A_THREAD = 8
THREADS_A_WARP = 32
MOST_PAIRS = 256  # of one row in a tile: a warp's 32 threads, 8 pairs each
MOST_ROWS = 4
WALK = 4  # tiles of rows, one after the other
ENOUGH_PROGRAMS = 2048  # several for each of the 100 to 200 multiprocessors of a large device
LIKELY_HALF = 32  # of PEFT's default group size: what slots with group sizes of their own most often have
# A program loads the members of small groups together and parts them in registers; below a vector of 16 bytes, two loads
# of half a group each would move a fraction of it. Only powers of two can be parted; others are found by index, where the
# second load finds the cache lines of the first.
LARGEST_SPLIT_HALF = 4


class Tile(NamedTuple):
    """rows x pairs are worked on at once; a program does `steps` of them, one below the other; warps: of 32 threads."""

    rows: int
    pairs: int
    steps: int
    warps: int


class Halves(NamedTuple):
    """Group sizes as the kernels take them: half: G / 2, or 0 where each slot has its own; split: H where tiles are
    loaded whole and parted in registers, else 0.
    """

    half: int
    split: int


def halves(group_size: int, *, uniform: bool) -> Halves:
    """How pairs of this group size are read; see `LARGEST_SPLIT_HALF`."""
    if not uniform:
        return Halves(0, 0)
    half = group_size // 2
    return Halves(half, half if half <= LARGEST_SPLIT_HALF and half == power_of_two(half) else 0)


def rotate_tile(num_routed: int, repeat: int, num_pairs: int) -> Tile:
    """For `num_routed` runs of `repeat` rows, each run of one slot (a whole batch of one slot is a single run)."""
    pairs = _pairs(num_pairs)
    rows = min(MOST_ROWS, power_of_two(repeat))
    programs = num_routed * cdiv(repeat, rows) * cdiv(num_pairs, pairs)
    steps = WALK if programs >= WALK * ENOUGH_PROGRAMS and repeat >= WALK * rows else 1
    return Tile(rows, pairs, steps, _warps(rows * pairs))


@lru_cache(1024)
def backward_tile(num_rows: int, num_pairs: int) -> Tile:
    """For sums over `num_rows` rows: a task is rows * steps of them, and leaves one row of partial sums.

    More rows a task, less scratch; fewer, more programs: 256 rows of 4096 outputs are 512 of them. Few rows are one task, which
    needs no second launch. Four sums a pair take registers, hence half the pairs of `rotate`.
    """
    pairs = _pairs(num_pairs) // 2
    steps = 2 if 8 * MOST_ROWS < num_rows <= 256 else 8 if num_rows <= 1024 else 16 if num_rows <= 8192 else 32
    return Tile(MOST_ROWS, pairs, steps, _warps(MOST_ROWS * pairs))


def _pairs(num_pairs: int) -> int:
    return max(2 * LARGEST_SPLIT_HALF, min(MOST_PAIRS, power_of_two(num_pairs)))


def _warps(pairs: int) -> int:
    return max(1, min(4, pairs // (THREADS_A_WARP * PAIRS_A_THREAD)))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (a positive integer)."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-number // divisor)
