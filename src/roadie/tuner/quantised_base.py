"""A base model in 4 or 8 bits, made ready for an adapter to be trained on it."""

from __future__ import annotations

from typing import Any

import peft


def prepare_quantised(model: Any) -> Any:
    """PEFT's `prepare_model_for_kbit_training`, without recomputation, and with gradients on a CPU that are right.

    On a CPU with avx512_bf16 bitsandbytes lays a layer's weight out anew at the first forward in evaluation mode, and what
    computes with the new layout has no gradient for the layer's input: everything below would learn from nothing, in
    silence, once a loss was measured. Layers of this model keep their layout.
    """
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in prepared.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepared
