"""Merging: rows of a weight are rotated in pairs, in place, a piece at a time; and what it takes to go back exactly.

``R (W x + b) = (R W) x + R b``: the weight and the bias are rotated, O(out * in), with no out x out matrix. Arithmetic
is in float32 (float64 for float64 weights) with one rounding, to the weight's dtype, however many adapters are merged.

**Going back.** The inverse rotation restores a rounded weight only up to its rounding. For bfloat16 and float16 the
difference between the original and what the inverse gives is therefore kept: nearly all zeros and ones in the last
place, a quarter of a byte an element for a well-conditioned adapter (see `patch`), so that unmerging gives back the original
bit for bit. Where it would take more than one byte an element (a badly conditioned R) the original is copied instead, and
that is logged. float32 weights come back within 1e-6 times the condition number of R, relative to the largest weight of
a pair, and exactly only on request, since it costs up to one byte an element and the time to compress it.
`set_exact_unmerge` trades this either way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from roadie.errors import AdapterError, MergeError
from roadie.rotation import Rotation, compose, inverse, pair_rows
from roadie.tuner.patch import Patch, make_patch

logger = logging.getLogger("roadie")

ELEMENTS_A_PIECE = 1 << 18  # 1 MiB in float32: temporaries stay in the cache, and extra memory stays small


class ExactUnmerge(str, Enum):
    """For which weights unmerging gives back the original bit for bit."""

    HALF = "half"  # bfloat16 and float16 (the default)
    ALWAYS = "always"  # every dtype
    NEVER = "never"  # keep nothing; the inverse rotation alone


def combined(rotations: Sequence[Rotation]) -> tuple[Rotation, ...]:
    """The rotations applied in the order given, as few as possible: neighbours of one group size are composed."""
    result: list[Rotation] = []
    for rotation in rotations:
        if result and result[-1].group_size == rotation.group_size:
            result[-1] = compose(rotation, result[-1])
        else:
            result.append(rotation)
    return tuple(result)


def pieces(weight: Tensor, rotations: Sequence[Rotation], dim: int) -> Iterator[tuple[Tensor, tuple[Rotation, ...]]]:
    """Views ``[rows, k]`` of a weight with whole groups in `rows`, and the rotations that belong to those rows.

    dim says where the outputs are: 0 for ``[D, in]`` and for a bias ``[D]``, 1 for ``[in, D]``.
    """
    table = weight.movedim(dim, 0)
    table = table.unsqueeze(1) if table.dim() == 1 else table
    width = max((rotation.group_size for rotation in rotations), default=2)
    step = _whole_groups(width, [rotation.group_size for rotation in rotations])
    step *= max(1, ELEMENTS_A_PIECE // (step * max(1, table.shape[1])))
    for start in range(0, table.shape[0], step):
        rows = slice(start, min(start + step, table.shape[0]))
        yield table[rows], tuple(Rotation(r.direct[rows], r.cross[rows], r.group_size) for r in rotations)


def _whole_groups(width: int, sizes: Sequence[int]) -> int:
    for size in sizes:
        width = math.lcm(width, size)
    return width


def rotated_rows(rows: Tensor, rotations: Sequence[Rotation]) -> Tensor:
    """``R rows`` for ``[D, k]``, in rows' dtype: float32 or wider inside, one rounding; a new tensor."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    result = rows.to(wide, copy=True)
    for rotation in rotations:
        _rotate_pairs_in_place(result, rotation)
    return result.to(rows.dtype)


def _rotate_pairs_in_place(rows: Tensor, rotation: Rotation) -> None:
    """`rotation.rotate_pairs`, product by product and sum by sum, written into the rows instead of new memory."""
    first, second = rows.unflatten(0, (-1, 2, rotation.group_size // 2)).unbind(1)
    direct1, cross1, direct2, cross2 = (vector.unsqueeze(-1) for vector in pair_rows(rotation, rows.dtype))
    from_second, from_first = cross1 * second, cross2 * first
    first.mul_(direct1).sub_(from_second)
    second.mul_(direct2).add_(from_first)


@dataclass(frozen=True)
class UndoRecord:
    """How to take one merge of one tensor back: the inverse rotations and, for an exact return, patches by piece."""

    undo: tuple[Rotation, ...]
    patches: tuple[Patch, ...] | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes kept for the exact return (0 where there is none)."""
        return sum(patch.nbytes for patch in self.patches or ())


def rotate_in_place(
    weight: Tensor, rotations: Sequence[Rotation], dim: int, undo: tuple[Rotation, ...] | None, exact: bool
) -> UndoRecord | None:
    """Merges `rotations` into `weight` and returns how to take it back; None where `undo` is None.

    If it is interrupted, the pieces that were done are taken back before the exception goes on.
    """
    patches: list[Patch] = []
    done = 0
    backwards = list(pieces(weight, undo, dim)) if undo is not None else []
    with torch.no_grad():
        try:
            for index, (rows, turns) in enumerate(pieces(weight, rotations, dim)):
                before = rows.clone() if exact and undo is not None else None
                rows.copy_(rotated_rows(rows, turns))
                done = index + 1
                if before is not None:
                    patches.append(make_patch(before, rotated_rows(rows, backwards[index][1])))
        except BaseException:
            if undo is not None:
                for index in range(done):
                    rows, back = backwards[index]
                    rows.copy_(_restored(rows, back, patches[index] if index < len(patches) else None))
            raise
    return None if undo is None else UndoRecord(undo, tuple(patches) if exact else None, weight.dtype)


def restore_in_place(weight: Tensor, record: UndoRecord, dim: int) -> None:
    """Takes a merge back; bit for bit where the record has patches and the weight still has the dtype it had."""
    patches = record.patches
    if patches is not None and weight.dtype != record.dtype:
        logger.warning("the weight was %s when merged and is %s now: unmerged by the inverse rotation alone",
                       record.dtype, weight.dtype)  # fmt: skip
        patches = None
    undo = tuple(Rotation(r.direct.to(weight.device), r.cross.to(weight.device), r.group_size) for r in record.undo)
    with torch.no_grad():
        for index, (rows, turns) in enumerate(pieces(weight, undo, dim)):
            rows.copy_(_restored(rows, turns, patches[index] if patches is not None else None))


def _restored(rows: Tensor, turns: Sequence[Rotation], patch: Patch | None) -> Tensor:
    back = rotated_rows(rows, turns)
    return back if patch is None else patch.apply(back)


def check_finite(weight: Tensor, rotations: Sequence[Rotation], dim: int, adapters: str, what: str) -> None:
    """Raise `MergeError` if merging would put a non-finite value into `weight`; changes nothing."""
    with torch.no_grad():
        for rows, turns in pieces(weight, rotations, dim):
            if not bool(torch.isfinite(rotated_rows(rows, turns)).all()):
                raise MergeError(
                    f"NaNs detected in the merged {what}. The adapter {adapters} seems to be broken: merging it would "
                    "give non-finite values. Nothing was changed; check the adapter, or the base weights."
                )


def undo_rotations(rotations: Sequence[Rotation]) -> tuple[Rotation, ...] | None:
    """The inverse rotations, computed in float64; None where a block is singular (the merge cannot be taken back)."""
    wide = [Rotation(r.direct.double(), r.cross.double(), r.group_size) for r in reversed(rotations)]
    try:
        undo = [inverse(rotation) for rotation in wide]
    except AdapterError:
        return None
    dtype = rotations[0].direct.dtype if rotations else torch.float32
    return tuple(Rotation(r.direct.to(dtype), r.cross.to(dtype), r.group_size) for r in undo)
