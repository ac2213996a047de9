"""The output of a base layer on its way through the rotation: in place where nobody can tell, and what backward keeps.

Legend: B rows of the batch, D out features, S slots.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roadie.kernels import Keep


class KeptForBackward(str, Enum):
    """Which tensor an adapted layer keeps for backward: one, of the output's size and dtype, and no more.

    OUTPUT is what the layer returns, which the next operation often keeps anyway; it must not be changed in place before
    backward, and no block of the rotation may be singular (alpha = 0). INPUT is the base layer's output, which nobody else
    keeps. AUTO keeps the output where all adapters in use are road_1, whose gradients lose nothing by it, as a lazy copy: a model
    may change what the layer returned (`roadie.kernels.keeping`). It keeps the input of road_2 and road_4, whose blocks may
    be badly conditioned.
    """

    AUTO = "auto"
    INPUT = "input"
    OUTPUT = "output"

    def of(self, *, is_road_1: bool) -> Keep:
        """What is kept for a table of adapters, all of which are road_1, or not."""
        if self is KeptForBackward.OUTPUT:
            return Keep.OUTPUT
        return Keep.COPY if self is KeptForBackward.AUTO and is_road_1 else Keep.INPUT


def gives_fresh_memory(layer: nn.Module) -> bool:
    """Whether a base layer returns a new tensor each time, which nobody else holds: of a known kind, and without hooks."""
    weight = layer._parameters.get("weight")
    return (
        _is_of_a_known_kind(type(layer))  # type: ignore[arg-type]
        and not layer._forward_hooks
        and "forward" not in layer.__dict__  # accelerate's hooks stand there
        and not nn.modules.module._global_forward_hooks
        # No tensor subclass, which decides itself what it returns; bitsandbytes' parameters are known.
        and (type(weight) is nn.Parameter or (weight is not None and type(weight.data) is Tensor))
    )


@cache
def _is_of_a_known_kind(kind: Any) -> bool:
    if kind in (nn.Linear, Conv1D):
        return True
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__name__ in ("Linear4bit", "Linear8bitLt")
