"""What backward keeps of a base layer's output on its way through the rotation."""

from __future__ import annotations

from enum import Enum

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
