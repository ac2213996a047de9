"""RoAd as a PEFT plug-in: config, layers, model, registration, rows. The only package of roadie that imports peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft

from roadie.tuner.config import RoadConfig
from roadie.tuner.inputs import RoadInput
from roadie.tuner.layer import Linear
from roadie.tuner.loading import allow_pickle
from roadie.tuner.merging import ExactUnmerge
from roadie.tuner.model import RoadModel
from roadie.tuner.output import KeptForBackward
from roadie.tuner.pair_training import train_only
from roadie.tuner.quantised_base import prepare_quantised
from roadie.tuner.registry import answer_with, is_registered, register, unregister
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.routing import rows
from roadie.tuner.snapshot import Snapshot, undone_if_raised
from roadie.tuner.with_lora import add_lora, load_together, lora_rows, save_together

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "ExactUnmerge",
    "KeptForBackward",
    "Linear",
    "PeftModel",
    "RoadConfig",
    "RoadInput",
    "RoadLayer",
    "RoadModel",
    "add_lora",
    "allow_pickle",
    "get_peft_model",
    "is_registered",
    "load_together",
    "lora_rows",
    "prepare_quantised",
    "register",
    "rows",
    "save_together",
    "train_only",
    "unregister",
]

answer_with(RoadConfig, RoadModel)


def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `get_peft_model`, with ROAD routed to roadie; same arguments, same result. If it raises, nothing was changed."""
    register()
    with undone_if_raised(Snapshot.of(model, getattr(peft_config, "__dict__", {})).restore):
        return peft.get_peft_model(model, peft_config, *args, **kwargs)


def __getattr__(name: str) -> Any:
    """PEFT's `PeftModel`: asking roadie for it is using roadie, and so routes ROAD to roadie each time."""
    if name == "PeftModel":
        register()
        return peft.PeftModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
