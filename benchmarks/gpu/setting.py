"""Where a case runs, which is what every kind of case is given first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """device: "cuda", or "cpu" for toy sizes; sizes: of models, by name."""

    device: str
    sizes: dict[str, dict[str, int]]
