"""The two doors to the kernels: rotate a batch, or each row of it by the rotations of its own slot.

    rotate(x, rotations, slots)     in new memory, differentiable
    rotate_(x, rotations, slots)    in place, where no gradient is needed

rotations: one `Rotation`, which every row uses; a `RotationTable`, with a rotation a slot; or several tables, for rotations in
a row (a chain). Slot -1 is the base and leaves its rows as they are, bit for bit. All rotations of a row are computed while it is
in the cache: in float32 (float64 for float64), with one rounding at the end. A slot whose group size is 0 in a table has no
rotation there.

``keep`` says what backward remembers: the rotation's "input", or its "output", which the next operation often keeps anyway, or
the output as a lazy "copy", which whoever changes the output in place does not reach; see `roadie.kernels.keeping`. Rotations in
a row keep their input, whatever is asked for: what lies between them is computed again, which is cheaper than a tensor of the
batch's size for each.

Legend: x ``[..., D]`` of any floating dtype, S slots, B routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from roadie.errors import AdapterError, ConfigError
from roadie.kernels.contract import PreparedRotation
from roadie.kernels.keeping import Keep
from roadie.kernels.step import in_place, prepare_checked, rotate_checked, seen
from roadie.kernels.table import RotationTable, as_chain, check
from roadie.kernels.traced import as_operations
from roadie.rotation import Rotation

Rotations: TypeAlias = Rotation | RotationTable | Sequence[RotationTable]


def rotate(
    x: Tensor, rotations: Rotations, slots: Tensor | None = None, *, keep: Keep | str = Keep.INPUT, into_x: bool = False
) -> Tensor:
    """Each row of x by the rotations of its slot, in x's dtype, with one rounding; differentiable in x, direct and cross.

    x: ``[B, ..., D]``; slots: int64, its shape that of x's first dimensions (``[B]``: a slot for x[b], ``[B, T]``: for
    x[b, t]), from -1 (the base) to S - 1, on x's device; None: slot 0 for every row. keep: "input"; or "output" or "copy" (no
    rotation may be singular then); nobody may change an "output" in place before backward. into_x: x may be written to, since
    nobody else holds it; that is done where backward does not need what it holds, and torch does not look on.
    Raises `AdapterError`, `RoutingError` where shapes do not fit, `ConfigError` for another `keep`, `KernelError` for slots out
    of range (on CPUs).
    """
    chain = as_chain(rotations)
    check(x, chain, slots)
    return rotate_checked(x, chain, slots, _keep(keep), into_x)


def rotate_(x: Tensor, rotations: Rotations, slots: Tensor | None = None) -> Tensor:
    """As `rotate`, in place of x, which is returned. Raises `AdapterError` where a gradient is needed."""
    chain = as_chain(rotations)
    check(x, chain, slots)
    is_memory, needs_gradient, _ = seen(x, chain)
    if needs_gradient:
        raise AdapterError(
            "got tensors that need a gradient; rotating in place would lose it; use rotate, or torch.no_grad()"
        )
    if not is_memory:
        return x.copy_(as_operations(x, chain, slots, Keep.INPUT))
    return in_place(x, chain, slots)


def prepare_rotation(y: Tensor, rotations: Rotations, slots: Tensor | None = None) -> PreparedRotation | None:
    """`rotate_` of tensors like y, made ready to be called many times; None where that would win nothing."""
    chain = as_chain(rotations)
    check(y, chain, slots)
    return prepare_checked(y, chain, slots)


def _keep(keep: Keep | str) -> Keep:
    try:
        return keep if isinstance(keep, Keep) else Keep(keep)
    except ValueError:
        raise ConfigError(f"got keep={keep!r}; wanted 'copy', 'input' or 'output'") from None
