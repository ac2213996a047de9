"""The methods that a configuration may name: those of docs/quality.md, what large models need, and directions."""

from __future__ import annotations

import peft
from torch import nn

from benchmarks.quality import methods
from benchmarks.quality.hub.directions import DIRECTIONS
from benchmarks.quality.methods import LORA, Method
from benchmarks.quality.tasks import CLASSIFICATION, LANGUAGE, Task

LARGE_RANK = 32


def _large_lora(model: nn.Module, task: Task) -> nn.Module:
    """LoRA as PEFT's method comparison has it: rank 32, alpha 64."""
    config = peft.LoraConfig(
        r=LARGE_RANK,
        lora_alpha=2 * LARGE_RANK,
        lora_dropout=0.0,
        target_modules=task.targets,
        modules_to_save=list(task.head) or None,
    )
    return peft.get_peft_model(model, config)


METHODS = {
    **methods.METHODS,
    "lora_r32": Method("lora_r32", LORA, _large_lora, {LANGUAGE: -8, CLASSIFICATION: -7}),
    **DIRECTIONS,
}
