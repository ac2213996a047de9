"""The reference implementation: what the others compute, in plain tensor operations on any device and dtype.

It works on a piece of the rows at a time, so that what is in between stays small next to the batch.

Legend: T rows, B routed rows, r = T / B rows a slot, D out features, S slots, W the dtype of arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from roadie.errors import KernelError
from roadie.kernels.contract import OF_OUTPUT, SUMS, Implementation, RowRotations, Turns
from roadie.kernels.table import RotationTable
from roadie.rotation import partner_columns, swap_unsigned

ELEMENTS_A_PIECE = 1 << 18  # 1 MiB in float32


def composed(x: Tensor, table: RotationTable, slots: Tensor | None) -> Tensor:
    """R x ``[..., D]`` as differentiable tensor operations on the whole of x at once: where torch must see what is computed.

    slots: in the shape of x's first dimensions, or None.
    """
    return _chosen(_turns(table, slots), slots, x.dim() - 1).turned(x).to(x.dtype)


def composed_gradients(
    grad: Tensor, kept: Tensor | None, table: RotationTable, slots: Tensor | None, keep_output: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, direct and cross as tensor operations that can be differentiated again (create_graph=True)."""
    turns = _turns(table, slots)
    direct, cross = table.direct, table.cross
    chosen = _chosen(turns, slots, grad.dim() - 1)
    grad_x = chosen.turned_back(grad).to(grad.dtype)
    if kept is None:
        return grad_x, None, None
    wide = _wide(grad, direct)
    g, value = grad.to(wide), kept.to(wide)
    own, partner = (_of_slots(term, slots, direct) for term in (g * value, g * chosen.partners(value)))
    grad_direct, grad_cross = solved(own, partner, turns, keep_output)
    return grad_x, grad_direct.to(direct.dtype), grad_cross.to(cross.dtype)


def _turns(table: RotationTable, slots: Tensor | None) -> RowRotations:
    return RowRotations(table.direct, table.cross, slots, 1, table.sizes, table.uniform_size)


def _of_slots(terms: Tensor, slots: Tensor | None, table: Tensor) -> Tensor:
    """The sum of ``[..., D]`` over the rows of each slot: ``[S, D]``."""
    width = terms.shape[-1]
    totals = torch.zeros(table.shape, dtype=terms.dtype, device=terms.device)
    if slots is None:
        return torch.cat((terms.reshape(-1, width).sum(0, keepdim=True), totals[1:]))
    of_rows = terms.reshape(slots.numel(), -1, width).sum(1)
    used = slots.flatten() >= 0
    return totals.index_put((slots.flatten()[used],), of_rows[used], accumulate=True)


class EagerImplementation(Implementation):
    """Plain tensor operations; see the module."""

    name = "eager"

    def refusal(self, device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype) -> str | None:
        """None for floating-point tensors, wherever they are."""
        return None if dtype.is_floating_point else f"it rotates floating-point tensors, and got {dtype}"

    def rotate(self, x: Tensor, out: Tensor, turns: RowRotations) -> None:
        """R x into out; see the contract."""
        _check(turns, x.shape[1])
        for piece in _pieces(x, turns):
            piece.of(out).copy_(piece.chosen.turned(piece.of(x)))

    def rotate_chain(self, x: Tensor, out: Tensor, chain: Turns) -> None:
        """A chain; see the contract."""
        _check_slots(chain[0])
        super().rotate_chain(x, out, chain)

    def backward(
        self,
        grad: Tensor,
        kept: Tensor | None,
        grad_x: Tensor | None,
        turns: RowRotations,
        own: Tensor | None,
        partner: Tensor | None,
        solve: int = SUMS,
    ) -> None:
        """R^T grad into grad_x, and what is made of the sums over rows; see the contract."""
        _check(turns, grad.shape[1])
        sums = [total.zero_() for total in (own, partner) if total is not None]
        for piece in _pieces(grad, turns):
            if kept is not None:
                _add(sums, piece.chosen, piece.of(grad), piece.of(kept))
            if grad_x is not None:
                piece.of(grad_x).copy_(piece.chosen.turned_back(piece.of(grad)))
        if solve and own is not None and partner is not None:
            of_direct, of_cross = solved(own, partner, turns, solve == OF_OUTPUT)
            own.copy_(of_direct), partner.copy_(of_cross)


def solved(own: Tensor, partner: Tensor, turns: RowRotations, of_output: bool) -> tuple[Tensor, Tensor]:
    """Gradients of direct and cross ``[S, D]`` from the sums."""
    size = turns.group_size if turns.sizes is None else turns.sizes.unsqueeze(-1)
    return (of_kept_output if of_output else of_kept_input)(own, partner, turns.direct, turns.cross, size)


def of_kept_input(
    own: Tensor, partner: Tensor, direct: Tensor, cross: Tensor, group_size: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of direct and cross ``[S, D]``, in the dtype of the sums, from sums over the rotation's input."""
    _, sign = partner_columns(group_size, own)
    return own, sign * partner


def of_kept_output(
    own: Tensor, partner: Tensor, direct: Tensor, cross: Tensor, group_size: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of direct and cross ``[S, D]`` from sums over the rotation's output: M R^-T, pair by pair.

    Not finite for a singular block, but 0 where its sums are: a slot that no row uses is not spoilt.
    """
    column, sign = partner_columns(group_size, own)
    d, c = direct.to(own.dtype), cross.to(own.dtype)
    other_d, other_c = d.gather(-1, column), c.gather(-1, column)
    determinant = d * other_d + c * other_c
    sums = torch.stack((own, partner))
    is_unused = ((sums == 0) & (sums.gather(-1, column.expand(sums.shape)) == 0)).all(0)
    determinant = determinant.masked_fill((determinant == 0) & is_unused, 1.0)
    grad_direct = (own * other_d - sign * partner * c) / determinant
    grad_cross = (own * other_c + sign * partner * d) / determinant
    return grad_direct, grad_cross


class _Chosen(NamedTuple):
    """What some rows need of the table, so that it broadcasts with them: ``[b, ..., D]``, all dimensions between 1."""

    direct: Tensor
    cross: Tensor
    slots: Tensor | None  # int64 [b, ..., 1]
    group_size: int | Tensor  # of all rows, or of each: [b, ..., 1]

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
        return z if self.slots is None else torch.where(self.slots < 0, x.to(z.dtype), z)

    def partners(self, x: Tensor) -> Tensor:
        """Each element's partner in its place: ``[b, ..., D]``."""
        if isinstance(self.group_size, int):
            return swap_unsigned(x, self.group_size)
        return x.gather(-1, partner_columns(self.group_size, x)[0])

    def signed(self, x: Tensor) -> Tensor:
        """The first members of all pairs negated."""
        return partner_columns(self.group_size, x)[1] * x


class _Piece(NamedTuple):
    """Some rows of the batch: as ``[b, r, D]``, b routed rows; a batch that is not routed is one routed row of slot 0."""

    rows: slice
    shape: tuple[int, int, int]
    chosen: _Chosen

    def of(self, matrix: Tensor) -> Tensor:
        """These rows of a matrix ``[T, D]``."""
        return matrix[self.rows].view(self.shape)


def _pieces(x: Tensor, turns: RowRotations) -> Iterator[_Piece]:
    """The batch in pieces of about `ELEMENTS_A_PIECE`, each of whole routed rows."""
    num_rows, width = x.shape
    step = max(1, ELEMENTS_A_PIECE // max(1, width * turns.repeat))
    for start in range(0, num_rows // turns.repeat, step):
        rows = slice(start * turns.repeat, min((start + step) * turns.repeat, num_rows))
        slots = None if turns.slots is None else turns.slots[start : start + step]
        shape = (1, rows.stop - rows.start, width) if slots is None else (len(slots), turns.repeat, width)
        yield _Piece(rows, shape, _chosen(turns, slots, 2))


def _chosen(turns: RowRotations, slots: Tensor | None, dims: int) -> _Chosen:
    """The rows of the table for `slots` (None: slot 0), with `dims` dimensions before the last."""
    if slots is None:
        size = turns.group_size if turns.sizes is None else turns.sizes[:1]
        return _Chosen(turns.direct[0], turns.cross[0], None, size)
    index, ones = slots.clamp(min=0), (1,) * (dims - slots.dim())
    direct, cross = (table[index].view(*slots.shape, *ones, -1) for table in (turns.direct, turns.cross))
    size = turns.group_size if turns.sizes is None else turns.sizes[index].view(*slots.shape, *ones, 1)
    return _Chosen(direct, cross, slots.view(*slots.shape, *ones, 1), size)


def _add(sums: list[Tensor], chosen: _Chosen, g: Tensor, kept: Tensor) -> None:
    """Adds the piece's rows to own and partner; the order of additions depends on shapes and slots alone."""
    own, partner = sums
    g, kept = g.to(own.dtype), kept.to(own.dtype)
    terms = (g * kept).sum(1), (g * chosen.partners(kept)).sum(1)
    if chosen.slots is None:
        own[0] += terms[0][0]
        partner[0] += terms[1][0]
        return
    slots = chosen.slots.view(-1)
    used = slots >= 0
    for total, term in zip(sums, terms, strict=True):
        if total.device.type == "cpu":
            total.index_add_(0, slots[used], term[used])
        else:  # sorts before it adds, where index_add_ uses atomic additions (on CPUs it is the other way round)
            total.index_put_((slots[used],), term[used], accumulate=True)


def _check(turns: RowRotations, width: int) -> None:
    """Refuse what the compiled kernel refuses; only on CPUs, since elsewhere a look would wait for the device."""
    highest = _check_slots(turns)
    if turns.slots is not None and turns.sizes is not None and highest >= 0:
        sizes = turns.sizes[turns.slots[turns.slots >= 0]]
        if bool(((sizes < 2) | (sizes % 2 != 0)).any()) or bool((width % sizes.clamp(min=1)).any()):
            raise KernelError(f"got group sizes {sizes.unique().tolist()}; wanted even ones that divide {width}")


def _check_slots(turns: RowRotations) -> int:
    """The highest slot, -1 where there is none to be seen; raises `KernelError` where one is out of range."""
    if turns.slots is None or turns.slots.device.type != "cpu" or not turns.slots.numel():
        return -1
    lowest, highest = (int(bound) for bound in torch.aminmax(turns.slots))
    if lowest < -1 or highest >= len(turns.direct):
        raise KernelError(f"got slots from {lowest} to {highest}; wanted -1 (the base) to {len(turns.direct) - 1}")
    return highest


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
