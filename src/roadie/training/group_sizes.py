"""Adapters with smaller groups in some layers, and what that costs: said once, where it happens."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger("roadie")


def tell_of_smaller_groups(
    sizes: Iterable[tuple[str, tuple[int, ...]]], asked: tuple[int, ...], whose: str = ""
) -> None:
    """Warn where layers have smaller groups than `asked` for, which adapt_group_size allows.

    sizes: the path and the group sizes, one a stage, of each adapted layer; whose: which of several adapters, to begin the line
    with.
    """
    found = sorted({(path.rpartition(".")[2], stages) for path, stages in sizes})
    smaller = [(name, stages) for name, stages in found if stages != asked]
    if smaller:
        layers = ", ".join(f"{name} {_shown(stages)}" for name, stages in smaller)
        logger.warning(
            "%sgroups are smaller than %s in some layers (%s): the adapter does not blend with others, but for those with the "
            "same groups in every layer, and roadie alone reads it",
            whose,
            _shown(asked),
            layers,
        )


def _shown(stages: tuple[int, ...]) -> str:
    return ",".join(map(str, stages))
