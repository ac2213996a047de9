"""Fast rotation: one meaning, and three implementations of it (`eager`, `cpu`, `triton`).

`api` is the door, `chain` the one for rotations in a row, `schema` what torch knows of the operations, `keeping` what backward
keeps, `contract` what an implementation must do, `choice` which one computes. torch only.
"""

from __future__ import annotations

from roadie.kernels.api import (
    RotationStep,
    RotationTable,
    can_rotate_in_place,
    prepare_rotation,
    rotate,
    rotate_,
    rotate_rows,
    rotate_rows_,
    takes_kernels,
)
from roadie.kernels.chain import Chain, can_rotate_chain_in_place, prepare_chain, rotate_chain, rotate_chain_
from roadie.kernels.choice import refusals, using
from roadie.kernels.contract import Implementation, RowRotations
from roadie.kernels.cpu import Watched
from roadie.kernels.cpu.prepared import PreparedRotation
from roadie.kernels.keeping import Keep, saved_tensors, settled, summed, to_save

__all__ = [
    "Chain",
    "Implementation",
    "Keep",
    "PreparedRotation",
    "RotationStep",
    "RotationTable",
    "RowRotations",
    "Watched",
    "can_rotate_chain_in_place",
    "can_rotate_in_place",
    "prepare_chain",
    "prepare_rotation",
    "refusals",
    "rotate",
    "rotate_",
    "rotate_chain",
    "rotate_chain_",
    "rotate_rows",
    "rotate_rows_",
    "saved_tensors",
    "settled",
    "summed",
    "takes_kernels",
    "to_save",
    "using",
]
