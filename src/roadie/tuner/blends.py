"""Blends of the adapters of a table, where rows ask for them in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roadie.bank.blends import Blend, blended
from roadie.kernels import Chain
from roadie.rotation import Rotation
from roadie.sites.table import chain_of_rows, rotations_at


def with_blends(chain: Chain | None, names: Sequence[str], wishes: Sequence[Any]) -> Chain | None:
    """From tables whose rows are the adapters `names`, those whose rows are `wishes`, blends of these adapters included.

    Adapters that are not among the names have no rotation.

    Differentiable. Raises `AdapterError` or `ConfigError` where a blend does not exist.
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
