"""A rotation that is ready to be applied again and again: for decoding, where everything around it counts.

After a base layer has streamed its weight through the caches, Python runs several times slower than in a loop of its own. What is
known before is therefore packed once, and one call of C asks the rest of the tensor that is given: 2 us of a layer's 170.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import TypeAlias

from torch import Tensor

from roadie.kernels.contract import RowRotations
from roadie.kernels.cpu import (
    BYTES_A_THREAD,
    JOB,
    TYPES,
    CpuImplementation,
    loaded,
    reader,
    stages_of,
    table_work,
)

PreparedRotation: TypeAlias = Callable[..., bool]
"""rotate(y) in place, rotate(y, z) into z, both ``[..., D]`` and contiguous; whether it was done.

Nothing is computed where y is not of the expected kind, or so large that several threads should share the work. Nobody may be
looking on (`roadie.kernels.is_looked_on`), which is for the caller to know.
"""

HEAD = Struct("@2P7q")  # the first fields of the struct Prepared of calls.c


def prepare(chain: Sequence[RowRotations], routed_shape: tuple[int, ...], y: Tensor) -> PreparedRotation | None:
    """One rotation, or several in a row, for outputs like y, whose first dimensions are `routed_shape`.

    None where the compiled kernel cannot be used, or no tensor be read by it.
    """
    make = loaded().callable
    if make is None or CpuImplementation().refusal(y.device, y.dtype, chain[0].direct.dtype) is not None:
        return None
    direct, cross, slots, _, sizes, group_size = chain[0]
    routed = slots.numel() if slots is not None else 1
    if not routed or len(routed_shape) > 2:
        return None
    width = direct.shape[1]
    lead = (*routed_shape, 0, 0)[:2]
    sizes_of_work = table_work(chain), 2 * BYTES_A_THREAD
    head = HEAD.pack(reader(), id(Tensor), routed, len(routed_shape), *lead, *sizes_of_work, len(chain))
    job = JOB.pack(
        *(0, 0, 0, direct.data_ptr(), cross.data_ptr()),
        *(0 if slots is None else slots.data_ptr(), 0 if sizes is None else sizes.data_ptr(), 0, 0),
        *(0, width, width, 0, width, 1, direct.shape[0], group_size, TYPES[y.dtype], TYPES[direct.dtype], 1),
    )
    return make(0, (head + job + stages_of(chain), tuple(chain)))
