"""The algebra of rotations beyond products and inverses: powers, blends, interpolation, means, differences, distances."""

from roadie.algebra.geometry import (
    Metric,
    corrected_weights,
    in_one_pairing,
    interpolate,
    mean,
    shares,
    squared_distance,
    subtract,
)
from roadie.algebra.powers import CANCELLATION, blend, logarithm, power

__all__ = [
    "CANCELLATION",
    "Metric",
    "blend",
    "corrected_weights",
    "in_one_pairing",
    "interpolate",
    "logarithm",
    "mean",
    "power",
    "shares",
    "squared_distance",
    "subtract",
]
