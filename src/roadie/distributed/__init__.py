"""Adapters on several processes: data parallel, sharded, tensor parallel; what is RoAd's own about each of them.

Names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie.distributed.processes import Processes, join, joined

__all__ = ["Processes", "join", "joined"]

_MODULES = {"processes": ("Processes", "join", "joined")}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
