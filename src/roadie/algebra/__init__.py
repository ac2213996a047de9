"""The algebra of rotations beyond products and inverses: powers, blends, interpolation, means, differences, distances."""

from roadie.algebra.chains import (
    blend_chains,
    compose_chains,
    interpolate_chains,
    inverse_chain,
    mean_chains,
    power_chain,
)
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
    "blend_chains",
    "compose_chains",
    "corrected_weights",
    "in_one_pairing",
    "interpolate",
    "interpolate_chains",
    "inverse_chain",
    "logarithm",
    "mean",
    "mean_chains",
    "power",
    "power_chain",
    "shares",
    "squared_distance",
    "subtract",
]
