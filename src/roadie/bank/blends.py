"""What a row may ask for: a name, the base model, or a blend of names with weights.

    "legal"                         the adapter
    None, "__base__"                the base model
    {"legal": 0.7, "terse": 0.3}    a mixture
    {"legal": 1.5}                  more of it;  {"legal": -1} its inverse

Servers are asked by the name of a model (`from_text`), in which the base model may be named:

    "legal=1.5"    "legal=0.7+terse=0.3"    "base:legal=0.7+terse=0.3"

Names may have ``= + :`` in them, too: within a blend a name ends before the first ``=`` that a weight and a ``+``, or the end,
follow.

A blend is one rotation a pair (`roadie.algebra.blend`), so that a row with a blend costs what any other row costs. Adapters
with longer chains blend stage by stage (`roadie.algebra.blend_chains`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from roadie.algebra import blend_chains
from roadie.errors import AdapterError, ConfigError, RoutingError
from roadie.kernels import Chain
from roadie.rotation import Rotation
from roadie.sites.table import chain_of_rows, rotations_at

BASE = "__base__"
Wish: TypeAlias = "str | Mapping[str, float] | None"
MAX_BLEND = 16
"""Adapters in one blend that a server is asked for."""
MAX_STRENGTH = 10.0
"""The largest weight of an adapter that a server is asked for, either sign."""
_WEIGHT = r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:e[+-]?\d{1,3})?"
_TERM = re.compile(rf"(.+?)=({_WEIGHT})(?:\+|$)", re.IGNORECASE | re.ASCII | re.DOTALL)


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


def without_base(model: str, base_names: Sequence[str]) -> str | None:
    """What follows the base model's name and a colon, or `model` where that is not in front; None for the base model itself."""
    if model in base_names:
        return None
    return next((model[len(name) + 1 :] for name in base_names if model.startswith(f"{name}:")), model)


def from_text(text: str) -> str | dict[str, float]:
    """`NAME`, or `NAME=WEIGHT` joined by `+`; raises `RoutingError` for what is neither, and by `check_weights`."""
    if "=" not in text:
        return text
    terms = tuple(_terms(text))
    weights = dict(terms)
    if len(weights) < len(terms):
        raise RoutingError(f"got an adapter twice in {text[:200]!r}; wanted each once")
    check_weights(weights)
    return weights


def _terms(text: str) -> Iterator[tuple[str, float]]:
    position = 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None or (term.end() == len(text) and text.endswith("+")):
            raise RoutingError(f"got {text[:200]!r}; wanted names with weights, as in legal=0.7+terse=0.3")
        yield term[1], float(term[2])
        position = term.end()


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `RoutingError` for too many adapters, or a weight that is no finite number within the limits of servers."""
    if len(weights) > MAX_BLEND:
        raise RoutingError(f"got a blend of {len(weights)} adapters; wanted at most {MAX_BLEND}")
    for name, weight in weights.items():
        if not math.isfinite(weight) or abs(weight) > MAX_STRENGTH:
            raise RoutingError(
                f"got weight {weight:g} of adapter {name[:128]!r}; wanted one from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
            )


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


def with_blends(chain: Chain | None, names: Sequence[str], wishes: Sequence[str | Blend]) -> Chain | None:
    """From tables whose rows are the adapters `names`, those whose rows are `wishes`, blends of these adapters included.

    Adapters that are not among the names have no rotation. Differentiable.

    Raises `AdapterError` or `ConfigError` where a blend does not exist.
    """
    if chain is None:
        return None
    rows: list[Sequence[Rotation]] = []
    for wish in wishes:
        weights = wish.weights if isinstance(wish, Blend) else ((wish, 1.0),)
        parts = [
            (name, weight, (rotations_at(chain, names.index(name)) if name in names else ()) or None)
            for name, weight in weights
        ]
        rotations = parts[0][2] if isinstance(wish, str) else blended(f"of {chain[0].direct.shape[1]} outputs", parts)
        rows.append(rotations or ())
    return chain_of_rows(rows, chain[0].direct.dtype)
