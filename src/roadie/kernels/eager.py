"""The reference implementation: what the others compute, in plain tensor operations on any device and dtype.

It works on a piece of the rows at a time, so that what is in between stays small next to the batch.

Legend: T rows, B routed rows, r = T / B rows a slot, D out features, S slots, W the dtype of arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from roadie.kernels.contract import Implementation, RowRotations
from roadie.rotation import partner_columns, swap_unsigned

ELEMENTS_A_PIECE = 1 << 18  # 1 MiB in float32


class EagerImplementation(Implementation):
    """Plain tensor operations; see the module."""

    name = "eager"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """None for floating-point tensors, wherever they are."""
        return None if dtype.is_floating_point else f"it rotates floating-point tensors, and got {dtype}"

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        for piece in _pieces(x, turns):
            out[piece.rows].view(piece.shape).copy_(piece.turned(x[piece.rows].view(piece.shape)))

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
    ) -> None:
        """R^T grad into grad_x, and the sums over rows; see the contract."""
        sums = [total.zero_() for total in (own, partner) if total is not None]
        for piece in _pieces(grad, turns):
            g = grad[piece.rows].view(piece.shape)
            if kept is not None:
                _add(sums, piece, g, kept[piece.rows].view(piece.shape))
            if grad_x is not None:
                grad_x[piece.rows].view(piece.shape).copy_(piece.turned_back(g))


class _Piece(NamedTuple):
    """Some rows of the batch, ``[b, r, D]``: b routed rows, and what they need of the table, ``[b, 1, D]``.

    A batch that is not routed is one routed row of slot 0.
    """

    rows: slice
    shape: tuple[int, int, int]
    direct: Tensor
    cross: Tensor
    slots: Tensor | None  # int64 [b]
    group_size: int | Tensor  # of all rows, or of each: [b, 1, 1]

    def turned(self, x: Tensor) -> Tensor:
        """R x, in the dtype of arithmetic."""
        wide = _wide(x, self.direct)
        direct, cross, value = self.direct.to(wide), self.cross.to(wide), x.to(wide)
        return self._but_the_base(x, direct * value + self.signed(cross) * self.partners(value))

    def turned_back(self, g: Tensor) -> Tensor:
        """R^T g, in the dtype of arithmetic."""
        wide = _wide(g, self.direct)
        direct, cross, value = self.direct.to(wide), self.cross.to(wide), g.to(wide)
        return self._but_the_base(g, direct * value + self.partners(self.signed(cross)) * self.partners(value))

    def _but_the_base(self, x: Tensor, z: Tensor) -> Tensor:
        return z if self.slots is None else torch.where(self.slots.view(-1, 1, 1) < 0, x.to(z.dtype), z)

    def partners(self, x: Tensor) -> Tensor:
        """Each element's partner in its place: ``[b, ..., D]``."""
        if isinstance(self.group_size, int):
            return swap_unsigned(x, self.group_size)
        return x.gather(-1, partner_columns(self.group_size, x)[0])

    def signed(self, x: Tensor) -> Tensor:
        """The first members of all pairs negated."""
        return partner_columns(self.group_size, x)[1] * x


def _pieces(x: Tensor, turns: RowRotations) -> Iterator[_Piece]:
    """The batch in pieces of about `ELEMENTS_A_PIECE`, each of whole routed rows."""
    num_rows, width = x.shape
    if turns.slots is None:
        size = turns.group_size if turns.sizes is None else turns.sizes[:1].view(1, 1, 1)
        step = max(1, ELEMENTS_A_PIECE // max(1, width))
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            direct, cross = (table[:1].unsqueeze(1) for table in (turns.direct, turns.cross))
            yield _Piece(slice(start, end), (1, end - start, width), direct, cross, None, size)
        return
    step = max(1, ELEMENTS_A_PIECE // max(1, width * turns.repeat))
    for start in range(0, len(turns.slots), step):
        slots = turns.slots[start : start + step]
        chosen = slots.clamp(min=0)
        size = turns.group_size if turns.sizes is None else turns.sizes[chosen].view(-1, 1, 1)
        rows = slice(start * turns.repeat, (start + len(slots)) * turns.repeat)
        direct, cross = (table[chosen].unsqueeze(1) for table in (turns.direct, turns.cross))
        yield _Piece(rows, (len(slots), turns.repeat, width), direct, cross, slots, size)


def _add(sums: list[Tensor], piece: _Piece, g: Tensor, kept: Tensor) -> None:
    """Adds the piece's rows to own and partner; the order of additions depends on shapes and slots alone."""
    own, partner = sums
    g, kept = g.to(own.dtype), kept.to(own.dtype)
    terms = (g * kept).sum(1), (g * piece.partners(kept)).sum(1)
    if piece.slots is None:
        own[0] += terms[0][0]
        partner[0] += terms[1][0]
        return
    used = piece.slots >= 0
    for total, term in zip(sums, terms, strict=True):
        # index_put_ sorts before it adds; index_add_ would use atomic additions on GPUs.
        total.index_put_((piece.slots[used],), term[used], accumulate=True)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
