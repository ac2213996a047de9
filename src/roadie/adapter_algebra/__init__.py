"""Whole adapters composed, inverted, strengthened, interpolated, averaged, subtracted, compared and converted.

The results are `Adapter` values like any other: saved, loaded by stock PEFT, admitted to a bank, trained on. The verbs take
rotations too; what they do to a layer is in `roadie.algebra`, what that makes of an adapter in `layers`.
"""

from roadie.adapter_algebra.conversion import Conversion, LayerLoss, convert
from roadie.adapter_algebra.operations import blend_adapters, compose_adapters, mean_adapters
from roadie.adapter_algebra.verbs import check_one_base, compose, distance, interpolate, inverse, mean, power, subtract

__all__ = [
    "Conversion",
    "LayerLoss",
    "blend_adapters",
    "check_one_base",
    "compose",
    "compose_adapters",
    "convert",
    "distance",
    "interpolate",
    "inverse",
    "mean",
    "mean_adapters",
    "power",
    "subtract",
]
