"""RoAd together with LoRA: the paper's combination, ``z = (R W + B A) x``; merged, mixed by row, saved as two files.

LoRA's branch is added to the rotated output and is not rotated itself. So LoRA's layers lie around roadie's, and merging has one
order: R into W first, B A after that.
"""

from __future__ import annotations

from roadie.tuner.with_lora.files import load_together, save_together
from roadie.tuner.with_lora.model import WithLora, add_lora, lora_of, without_lora, without_road
from roadie.tuner.with_lora.rows import lora_rows

__all__ = [
    "WithLora",
    "add_lora",
    "load_together",
    "lora_of",
    "lora_rows",
    "save_together",
    "without_lora",
    "without_road",
]
