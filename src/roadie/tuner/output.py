"""The output of a base layer on its way through the rotation: in place where nobody can tell, and what backward keeps.

Legend: B rows of the batch, D out features, S slots.
"""

from __future__ import annotations

from enum import Enum
from functools import reduce

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roadie.kernels import Chain, Keep, RotationTable
from roadie.rotation import Rotation, Variant, compose


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

    def of(self, variants: set[str]) -> Keep:
        """What is kept for a table of adapters of these variants."""
        if self is KeptForBackward.OUTPUT:
            return Keep.OUTPUT
        is_auto = self is KeptForBackward.AUTO
        return Keep.COPY if is_auto and variants <= {Variant.ROAD_1.value} else Keep.INPUT


def one_rotation(chain: Chain) -> Chain:
    """The product of a table's rows, the first applied first, as a table of one row; all rows have one group size.

    Tables of one row, of which there may be several, stay what they are.
    """
    if len(chain[0].direct) == 1:
        return chain
    (table,) = chain
    size = table.uniform_size
    rows = [Rotation(direct, cross, size) for direct, cross in zip(table.direct, table.cross, strict=True)]
    product = reduce(lambda inner, outer: compose(outer, inner), rows)
    return (RotationTable(product.direct.unsqueeze(0), product.cross.unsqueeze(0), size),)


def gives_fresh_memory(layer: nn.Module) -> bool:
    """Whether a base layer returns a new tensor each time, which nobody else holds: of a known kind, and without hooks."""
    return (
        _is_of_a_known_kind(type(layer))
        and not layer._forward_hooks
        and "forward" not in layer.__dict__  # accelerate's hooks stand there
        and not nn.modules.module._global_forward_hooks
        and _is_plain(layer._parameters.get("weight"))
    )


def _is_of_a_known_kind(kind: type[nn.Module]) -> bool:
    if kind in (nn.Linear, Conv1D):
        return True
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def _is_plain(weight: Tensor | None) -> bool:
    """Whether a weight is no tensor subclass, which decides itself what it returns; bitsandbytes' are known."""
    return type(weight) is nn.Parameter or (weight is not None and type(weight.data) is Tensor)
