"""RoAd adapters for PEFT: 2D rotary adaptation (Liao & Monz 2024, arXiv 2409.00119).

`import roadie` loads neither torch nor PEFT and changes nothing: a name is looked up in its module when it is used.
Names of the mathematics and of the bank (`Rotation`, `rotate`, `AdapterBank` ...) load torch and safetensors at most. Names of
the tuner (`RoadConfig`, `get_peft_model` ...) load PEFT, and using them routes its ROAD method to roadie; `unregister` restores
what was there.

Read `roadie/rotation.py` first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie import checkpoint, embedded, errors, testing
    from roadie.adapter import Adapter, LayerParameters
    from roadie.bank import AdapterBank, rows
    from roadie.errors import RoadieError
    from roadie.rotation import (
        Rotation,
        Variant,
        compose,
        from_parameters,
        identity,
        inverse,
        rotate,
        rotate_weight,
        shard,
        to_dense,
        to_parameters,
    )
    from roadie.tuner import (
        Linear,
        PeftModel,
        RoadConfig,
        RoadLayer,
        RoadModel,
        get_peft_model,
        register,
        unregister,
    )

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterBank",
    "LayerParameters",
    "Linear",
    "PeftModel",
    "RoadConfig",
    "RoadLayer",
    "RoadModel",
    "RoadieError",
    "Rotation",
    "Variant",
    "checkpoint",
    "compose",
    "embedded",
    "errors",
    "from_parameters",
    "get_peft_model",
    "identity",
    "inverse",
    "register",
    "rotate",
    "rotate_weight",
    "rows",
    "shard",
    "testing",
    "to_dense",
    "to_parameters",
    "unregister",
]

_NAMES = {
    "roadie.adapter": ("Adapter", "LayerParameters"),
    "roadie.bank": ("AdapterBank", "rows"),
    "roadie.errors": ("RoadieError",),
    "roadie.rotation": (
        *("Rotation", "Variant", "compose", "from_parameters", "identity", "inverse", "rotate", "rotate_weight"),
        *("shard", "to_dense", "to_parameters"),
    ),
    "roadie.tuner": (
        *("Linear", "PeftModel", "RoadConfig", "RoadLayer", "RoadModel", "get_peft_model", "register"),
        "unregister",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("checkpoint", "embedded", "errors", "testing")


def __getattr__(name: str) -> Any:
    """The public object `name`, fetched anew each time: `roadie.tuner` routes PEFT to roadie whenever its names are used."""
    if name in _MODULES:
        return import_module(f"roadie.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'roadie' has no attribute {name!r}; its public names are in roadie.__all__")


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
