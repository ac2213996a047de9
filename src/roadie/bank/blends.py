"""What a row may ask for: a name, the base model, or a blend of names with weights.

    "legal"                         the adapter
    None, "__base__"                the base model
    {"legal": 0.7, "terse": 0.3}    a mixture
    {"legal": 1.5}                  more of it;  {"legal": -1} its inverse

A blend is one rotation a pair (`roadie.algebra.blend`), so that a row with a blend costs what any other row costs. Adapters
with longer chains blend stage by stage (`roadie.algebra.blend_chains`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from roadie.algebra import blend_chains
from roadie.errors import AdapterError, ConfigError, RoutingError
from roadie.rotation import Rotation

BASE = "__base__"
Wish: TypeAlias = "str | Mapping[str, float] | None"


@dataclass(frozen=True)
class Blend:
    """Names and weights, in the order of the names, none of weight 0; `versions`: of each adapter, to tell old from new."""

    weights: tuple[tuple[str, float], ...]
    versions: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters it is made of."""
        return tuple(name for name, _ in self.weights)


def names_in(wish: str | Blend | None) -> tuple[str, ...]:
    """The adapters that a row's wish reads."""
    return wish.names if isinstance(wish, Blend) else () if wish is None else (wish,)


def parse(wish: Wish) -> str | Blend | None:
    """A name, a blend, or None for the base model; raises `RoutingError` for what is none of these.

    A blend of one adapter with weight 1 is the adapter; one in which nothing is left is the base model.
    """
    if wish is None or wish == BASE:
        return None
    if isinstance(wish, str):
        return wish
    if not isinstance(wish, Mapping) or not all(isinstance(name, str) for name in wish):
        raise RoutingError(
            f"got {wish!r} for a row; wanted an adapter's name, '__base__', or a mapping of names to weights"
        )
    for name, weight in wish.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise RoutingError(f"got weight {weight!r} for adapter {name!r}; wanted a finite number")
    weights = tuple(sorted((name, float(weight)) for name, weight in wish.items() if weight != 0 and name != BASE))
    if not weights:
        return None
    return weights[0][0] if len(weights) == 1 and weights[0][1] == 1 else Blend(weights)


def blended(path: str, parts: Sequence[tuple[str, float, Sequence[Rotation] | None]]) -> Sequence[Rotation] | None:
    """The blend of (name, weight, chain) in the layer `path`; what is None is the identity, which adds nothing.

    Raises `AdapterError` or `ConfigError`, naming layer and adapters, where a block has no logarithm or sizes differ.
    """
    present = [(name, weight, rotations) for name, weight, rotations in parts if rotations is not None]
    if not present:
        return None
    try:
        return blend_chains([rotations for _, _, rotations in present], [weight for _, weight, _ in present])
    except (AdapterError, ConfigError) as error:
        shown = " + ".join(f"{weight:g} {name}" for name, weight, _ in present)
        raise type(error)(f"{error} Layer: {path!r}; blend: {shown}.") from None
