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

from roadie.version import __version__ as __version__

if TYPE_CHECKING:
    from roadie import checkpoint, embedded, errors, fit, inspect, subspaces, testing
    from roadie.adapter import Adapter, LayerParameters
    from roadie.adapter_algebra import compose, convert, distance, interpolate, inverse, mean, power, subtract
    from roadie.bank import AdapterBank, rows
    from roadie.errors import RoadieError
    from roadie.lora import save_lora, to_lora
    from roadie.rotation import (
        Rotation,
        Variant,
        from_parameters,
        identity,
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
        add_lora,
        get_peft_model,
        load_together,
        lora_rows,
        register,
        save_together,
        train_only,
        unregister,
    )

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
    "add_lora",
    "checkpoint",
    "compose",
    "convert",
    "distance",
    "embedded",
    "errors",
    "fit",
    "from_parameters",
    "get_peft_model",
    "identity",
    "inspect",
    "interpolate",
    "inverse",
    "load_together",
    "lora_rows",
    "mean",
    "power",
    "register",
    "rotate",
    "rotate_weight",
    "rows",
    "save_lora",
    "save_together",
    "shard",
    "subspaces",
    "subtract",
    "testing",
    "to_dense",
    "to_lora",
    "to_parameters",
    "train_only",
    "unregister",
]

_NAMES = {
    "roadie.adapter": ("Adapter", "LayerParameters"),
    "roadie.adapter_algebra": (
        *("compose", "convert", "distance", "interpolate", "inverse", "mean", "power", "subtract"),
    ),
    "roadie.bank": ("AdapterBank", "rows"),
    "roadie.errors": ("RoadieError",),
    "roadie.lora": ("save_lora", "to_lora"),
    "roadie.rotation": (
        *("Rotation", "Variant", "from_parameters", "identity", "rotate", "rotate_weight"),
        *("shard", "to_dense", "to_parameters"),
    ),
    "roadie.tuner": (
        *("Linear", "PeftModel", "RoadConfig", "RoadLayer", "RoadModel", "add_lora", "get_peft_model", "load_together"),
        *("lora_rows", "register", "save_together", "train_only", "unregister"),
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("checkpoint", "embedded", "errors", "fit", "inspect", "subspaces", "testing")


def __getattr__(name: str) -> Any:
    """The public object `name`, fetched anew each time: `roadie.tuner` routes PEFT to roadie whenever its names are used."""
    if name in _MODULES:
        return import_module(f"roadie.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'roadie' has no attribute {name!r}; its public names are in roadie.__all__")


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
