"""Fast rotation: one meaning, and three implementations of it (`eager`, `cpu`, `triton`).

`api` has the doors, `table` what they take, `step` what is done, `traced` and `schema` what torch sees of it, `keeping` what
backward keeps, `stamp` whether tensors are what they were, `contract` what an implementation must do, `choice` which one
computes. torch only.
"""

from __future__ import annotations

import roadie.kernels.schema as _registered  # noqa: F401 - torch knows the operations from here on
from roadie.kernels.api import prepare_rotation, rotate, rotate_
from roadie.kernels.choice import refusals, using
from roadie.kernels.contract import Implementation, PreparedRotation, RowRotations
from roadie.kernels.keeping import Keep, writes_to
from roadie.kernels.stamp import Place, Stamp, can_be_stamped
from roadie.kernels.step import is_looked_on, prepare_checked, rotate_checked
from roadie.kernels.table import Chain, RotationTable, table_of

__all__ = [
    "Chain",
    "Implementation",
    "Keep",
    "Place",
    "PreparedRotation",
    "RotationTable",
    "RowRotations",
    "Stamp",
    "can_be_stamped",
    "is_looked_on",
    "prepare_checked",
    "prepare_rotation",
    "refusals",
    "rotate",
    "rotate_",
    "rotate_checked",
    "table_of",
    "using",
    "writes_to",
]
