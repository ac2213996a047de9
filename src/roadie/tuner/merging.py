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
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor

from roadie.algebra.chains import inverse_chain
from roadie.errors import AdapterError, MergeError
from roadie.rotation import Rotation, pair_rows
from roadie.tuner.patch import Patch, make_patch
from roadie.tuner.snapshot import undone_if_raised

logger = logging.getLogger("roadie")

ELEMENTS_A_PIECE = 1 << 18  # 1 MiB in float32: temporaries stay in the cache, and extra memory stays small


class ExactUnmerge(str, Enum):
    """For which weights unmerging gives back the original bit for bit."""

    HALF = "half"  # bfloat16 and float16 (the default)
    ALWAYS = "always"  # every dtype
    NEVER = "never"  # keep nothing; the inverse rotation alone

    def holds_for(self, tensor: Tensor) -> bool:
        """Whether a weight (or bias) of this dtype comes back so."""
        size = tensor.element_size()
        return size == 2 if self is ExactUnmerge.HALF else self is ExactUnmerge.ALWAYS and size > 1


@dataclass(frozen=True)
class WeightRotations:
    """What merging does to a weight ``[D, in]``: its columns are rotated by `rows`, its rows by `columns`.

    rows: chain ``[D]`` of the outputs; columns: chain ``[in]``, the transposed of what rotates the input.
    """

    rows: tuple[Rotation, ...]
    columns: tuple[Rotation, ...] = ()

    @property
    def of_bias(self) -> WeightRotations:
        """What is done to a bias, as a weight ``[D, 1]``."""
        return WeightRotations(self.rows)

    def of_rows(self, rows: slice) -> WeightRotations:
        """The part that belongs to some of the rows."""
        part = tuple(Rotation(r.direct[rows], r.cross[rows], r.group_size) for r in self.rows)
        return WeightRotations(part, self.columns)


def pieces(weight: Tensor, rotations: WeightRotations, dim: int | None) -> Iterator[tuple[Tensor, WeightRotations]]:
    """Views ``[rows, k]`` of a weight with whole groups in `rows`, and what is done to those rows.

    dim says where the outputs are: 0 for ``[D, in]`` and for a bias ``[D]``, 1 for ``[in, D]``; None for blocks
    ``[..., D', in]``, whose outputs are those of the first, then those of the next, and no group crosses a border.
    """
    step = math.lcm(2, *(rotation.group_size for rotation in rotations.rows))
    for begin, table in _blocks(weight, dim):
        height = step * max(1, ELEMENTS_A_PIECE // (step * max(1, table.shape[1])))
        for start in range(0, table.shape[0], height):
            stop = min(start + height, table.shape[0])
            yield table[start:stop], rotations.of_rows(slice(begin + start, begin + stop))


def _blocks(weight: Tensor, dim: int | None) -> Iterator[tuple[int, Tensor]]:
    """Views ``[D', k]`` of a weight, and the number of the first output of each."""
    if dim is not None:
        table = weight.movedim(dim, 0)
        yield 0, table.unsqueeze(1) if table.dim() == 1 else table
        return
    for number, index in enumerate(product(*map(range, weight.shape[:-2]))):
        yield number * weight.shape[-2], weight[index]


@torch.no_grad()
def rotated_rows(rows: Tensor, rotations: WeightRotations) -> Tensor:
    """``R rows R_in`` for ``[D, k]``, in rows' dtype: float32 or wider inside, one rounding; a new tensor."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    result = rows.to(wide, copy=True)
    for rotation in rotations.rows:
        _rotate_pairs_in_place(result, rotation)
    for rotation in rotations.columns:
        _rotate_pairs_in_place(result.mT, rotation)
    return result.to(rows.dtype)


def _rotate_pairs_in_place(rows: Tensor, rotation: Rotation) -> None:
    """`rotation.rotate_pairs`, product by product and sum by sum, written into the rows instead of new memory."""
    first, second = rows.unflatten(0, (-1, 2, rotation.group_size // 2)).unbind(1)
    vectors = (vector.to(rows.device) for vector in pair_rows(rotation, rows.dtype))
    direct1, cross1, direct2, cross2 = (vector.unsqueeze(-1) for vector in vectors)
    from_second, from_first = cross1 * second, cross2 * first
    first.mul_(direct1).sub_(from_second)
    second.mul_(direct2).add_(from_first)


@dataclass(frozen=True)
class UndoRecord:
    """How to take one merge of one tensor back: the inverse rotations and, for an exact return, patches by piece."""

    undo: WeightRotations
    patches: tuple[Patch, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes kept for the exact return (0 where there is none)."""
        return sum(patch.nbytes for patch in self.patches)


def rotate_in_place(
    weight: Tensor, rotations: WeightRotations, dim: int | None, exact: ExactUnmerge
) -> UndoRecord | None:
    """Merges `rotations` into `weight` and returns how to take it back; None where a block is singular.

    If it is interrupted, the pieces that were done are taken back before the exception goes on, unless a block is singular.
    """
    undo = inverses(rotations)
    backwards = [] if undo is None else list(pieces(weight, undo, dim))
    is_exact = undo is not None and exact.holds_for(weight)
    patches: list[Patch] = []
    done = 0
    with torch.no_grad():
        try:
            for index, (rows, part) in enumerate(pieces(weight, rotations, dim)):
                merged = rotated_rows(rows, part)
                if is_exact:
                    patches.append(make_patch(rows, rotated_rows(merged, backwards[index][1])))
                rows.copy_(merged)
                done = index + 1
        except BaseException:
            for index, (rows, back) in enumerate(backwards[:done]):
                rows.copy_(_restored(rows, back, patches[index] if patches else None))
            raise
    return None if undo is None else UndoRecord(undo, tuple(patches), weight.dtype)


def restore_in_place(weight: Tensor, record: UndoRecord, dim: int | None) -> None:
    """Takes a merge back; bit for bit where the record has patches and the weight still has the dtype it had."""
    patches = record.patches
    if patches and weight.dtype != record.dtype:
        logger.warning("the weight was %s when merged and is %s now: unmerged by the inverse rotation alone",
                       record.dtype, weight.dtype)  # fmt: skip
        patches = ()
    with torch.no_grad():
        for index, (rows, rotations) in enumerate(pieces(weight, record.undo, dim)):
            rows.copy_(_restored(rows, rotations, patches[index] if patches else None))


def _restored(rows: Tensor, rotations: WeightRotations, patch: Patch | None) -> Tensor:
    back = rotated_rows(rows, rotations)
    return back if patch is None else patch.apply(back)


@contextmanager
def onloaded(layer: BaseTunerLayer) -> Iterator[None]:
    """Within the block the layer's weights are in memory, also where accelerate offloads them, and can be written."""
    with torch.no_grad(), onload_layer(layer):
        yield


@contextmanager
def all_or_none(layers: Sequence[Any]) -> Iterator[None]:
    """If the block raises, what was merged into the layers within it is taken back: at most one merge each."""
    before = [(layer, len(layer.merged_adapters)) for layer in layers]

    def take_back() -> None:
        for layer, count in before:
            if len(layer.merged_adapters) > count:
                with onloaded(layer):
                    layer.undo_last_merge()

    with undone_if_raised(take_back):
        yield


def check_finite(weight: Tensor, rotations: WeightRotations, dim: int | None, adapters: str, what: str) -> None:
    """Raise `MergeError` if merging would put a non-finite value into `weight`; changes nothing."""
    for rows, part in pieces(weight, rotations, dim):
        if not bool(torch.isfinite(rotated_rows(rows, part)).all()):
            raise MergeError(
                f"NaNs detected in the merged {what}. The adapter {adapters} seems to be broken: merging it would "
                "give non-finite values. Nothing was changed; check the adapter, or the base weights."
            )


def inverses(rotations: WeightRotations) -> WeightRotations | None:
    """What takes a merge back, computed in float64; None where a block is singular (the merge cannot be taken back)."""
    try:
        return WeightRotations(_inverses(rotations.rows), _inverses(rotations.columns))
    except AdapterError:
        return None


def _inverses(chain: Sequence[Rotation]) -> tuple[Rotation, ...]:
    wide = inverse_chain([Rotation(r.direct.double(), r.cross.double(), r.group_size) for r in chain])
    return tuple(Rotation(r.direct.to(chain[0].direct), r.cross.to(chain[0].direct), r.group_size) for r in wide)
