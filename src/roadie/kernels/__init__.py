"""Fast rotation: one meaning, and three implementations of it (`eager`, `cpu`, `triton`).

`api` is the door, `schema` what torch knows of the operations, `contract` what an implementation must do, `choice` which
one computes. torch only.
"""

from __future__ import annotations

from roadie.kernels.api import (
    Keep,
    RotationTable,
    can_rotate_in_place,
    prepare_rotation,
    rotate,
    rotate_,
    rotate_rows,
    rotate_rows_,
)
from roadie.kernels.choice import refusals, using
from roadie.kernels.contract import Implementation, RowRotations
from roadie.kernels.cpu.prepared import PreparedRotation

__all__ = [
    "Implementation",
    "Keep",
    "PreparedRotation",
    "RotationTable",
    "RowRotations",
    "can_rotate_in_place",
    "prepare_rotation",
    "refusals",
    "rotate",
    "rotate_",
    "rotate_rows",
    "rotate_rows_",
    "using",
]
