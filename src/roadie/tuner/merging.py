"""Merging: rows of a weight are rotated in pairs, in place, a piece at a time; and what it takes to go back exactly.

``R (W x + b) = (R W) x + R b``: the weight and the bias are rotated, O(out * in), with no out x out matrix; where the input is
rotated too, ``R W R_in``, the columns of a piece are as well, and the bias is not. Arithmetic is in float32 (float64 for float64
weights) with one rounding, to the weight's dtype, however many adapters are merged.

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

from roadie.algebra.chains import compose_chains
from roadie.errors import AdapterError, MergeError
from roadie.rotation import Rotation, inverse, pair_rows
from roadie.tuner.patch import Patch, make_patch

logger = logging.getLogger("roadie")

ELEMENTS_A_PIECE = 1 << 18  # 1 MiB in float32: temporaries stay in the cache, and extra memory stays small


class ExactUnmerge(str, Enum):
    """For which weights unmerging gives back the original bit for bit."""

    HALF = "half"  # bfloat16 and float16 (the default)
    ALWAYS = "always"  # every dtype
    NEVER = "never"  # keep nothing; the inverse rotation alone


@dataclass(frozen=True)
class Turns:
    """What is done to a weight ``[D, in]``: its columns are turned by `rows`, its rows by `columns`, the first before the others.

    rows: rotations ``[D]`` of the outputs; columns: rotations ``[in]``, the transposed of what rotates the input.
    """

    rows: tuple[Rotation, ...]
    columns: tuple[Rotation, ...] = ()

    @property
    def of_bias(self) -> Turns:
        """What is done to a bias, as a weight ``[D, 1]``."""
        return Turns(self.rows)

    def on(self, device: torch.device) -> Turns:
        """The same on `device`."""
        return Turns(_on(self.rows, device), _on(self.columns, device))

    def of_rows(self, rows: slice) -> Turns:
        """The part that belongs to some of the rows."""
        part = tuple(Rotation(r.direct[rows], r.cross[rows], r.group_size) for r in self.rows)
        return Turns(part, self.columns)


def _on(rotations: Sequence[Rotation], device: torch.device) -> tuple[Rotation, ...]:
    return tuple(Rotation(r.direct.to(device), r.cross.to(device), r.group_size) for r in rotations)


def combined(rotations: Sequence[Rotation]) -> tuple[Rotation, ...]:
    """The rotations applied in the order given, as few as possible: neighbours of one group size are composed."""
    return compose_chains(rotations, ())


def pieces(weight: Tensor, turns: Turns, dim: int) -> Iterator[tuple[Tensor, Turns]]:
    """Views ``[rows, k]`` of a weight with whole groups in `rows`, and what is done to those rows.

    dim says where the outputs are: 0 for ``[D, in]`` and for a bias ``[D]``, 1 for ``[in, D]``.
    """
    table = weight.movedim(dim, 0)
    table = table.unsqueeze(1) if table.dim() == 1 else table
    step = math.lcm(2, *(rotation.group_size for rotation in turns.rows))
    step *= max(1, ELEMENTS_A_PIECE // (step * max(1, table.shape[1])))
    for start in range(0, table.shape[0], step):
        rows = slice(start, min(start + step, table.shape[0]))
        yield table[rows], turns.of_rows(rows)


def rotated_rows(rows: Tensor, turns: Turns) -> Tensor:
    """``R rows R_in`` for ``[D, k]``, in rows' dtype: float32 or wider inside, one rounding; a new tensor."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    result = rows.to(wide, copy=True)
    for rotation in turns.rows:
        _rotate_pairs_in_place(result, rotation)
    for rotation in turns.columns:
        _rotate_pairs_in_place(result.mT, rotation)
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

    undo: Turns
    patches: tuple[Patch, ...] | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes kept for the exact return (0 where there is none)."""
        return sum(patch.nbytes for patch in self.patches or ())


def rotate_in_place(weight: Tensor, turns: Turns, dim: int, undo: Turns | None, exact: bool) -> UndoRecord | None:
    """Merges `turns` into `weight` and returns how to take it back; None where `undo` is None.

    If it is interrupted, the pieces that were done are taken back before the exception goes on.
    """
    patches: list[Patch] = []
    done = 0
    backwards = list(pieces(weight, undo, dim)) if undo is not None else []
    with torch.no_grad():
        try:
            for index, (rows, part) in enumerate(pieces(weight, turns, dim)):
                merged = rotated_rows(rows, part)
                if exact and undo is not None:
                    patches.append(make_patch(rows, rotated_rows(merged, backwards[index][1])))
                rows.copy_(merged)
                done = index + 1
        except BaseException:
            if undo is not None:
                for index in range(done):
                    rows, back = backwards[index]
                    rows.copy_(_restored(rows, back, patches[index] if patches else None))
            raise
    return None if undo is None else UndoRecord(undo, tuple(patches) if exact else None, weight.dtype)


def restore_in_place(weight: Tensor, record: UndoRecord, dim: int) -> None:
    """Takes a merge back; bit for bit where the record has patches and the weight still has the dtype it had."""
    patches = record.patches
    if patches is not None and weight.dtype != record.dtype:
        logger.warning("the weight was %s when merged and is %s now: unmerged by the inverse rotation alone",
                       record.dtype, weight.dtype)  # fmt: skip
        patches = None
    with torch.no_grad():
        for index, (rows, turns) in enumerate(pieces(weight, record.undo.on(weight.device), dim)):
            rows.copy_(_restored(rows, turns, patches[index] if patches is not None else None))


def _restored(rows: Tensor, turns: Turns, patch: Patch | None) -> Tensor:
    back = rotated_rows(rows, turns)
    return back if patch is None else patch.apply(back)


def check_finite(weight: Tensor, turns: Turns, dim: int, adapters: str, what: str) -> None:
    """Raise `MergeError` if merging would put a non-finite value into `weight`; changes nothing."""
    with torch.no_grad():
        for rows, part in pieces(weight, turns, dim):
            if not bool(torch.isfinite(rotated_rows(rows, part)).all()):
                raise MergeError(
                    f"NaNs detected in the merged {what}. The adapter {adapters} seems to be broken: merging it would "
                    "give non-finite values. Nothing was changed; check the adapter, or the base weights."
                )


def undo_turns(turns: Turns) -> Turns | None:
    """What takes a merge back, computed in float64; None where a block is singular (the merge cannot be taken back)."""
    rows, columns = _inverses(turns.rows), _inverses(turns.columns)
    return None if rows is None or columns is None else Turns(rows, columns)


def _inverses(rotations: Sequence[Rotation]) -> tuple[Rotation, ...] | None:
    wide = [Rotation(r.direct.double(), r.cross.double(), r.group_size) for r in reversed(rotations)]
    try:
        undo = [inverse(rotation) for rotation in wide]
    except AdapterError:
        return None
    dtype = rotations[0].direct.dtype if rotations else torch.float32
    return tuple(Rotation(r.direct.to(dtype), r.cross.to(dtype), r.group_size) for r in undo)
