"""Training, merging and generating: everything the command line does, as functions.

Names resolve on first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie.training.adapters import AdaptedModel, NamedAdapter, adapter_folder, load_adapted, parse_adapters
    from roadie.training.generation import Decoding, continue_prompts, generate
    from roadie.training.merging import MergeResult, merge_to_disk
    from roadie.training.models import ModelSource, load_model, load_tokenizer
    from roadie.training.prompts import Prompt
    from roadie.training.recipe import Recipe
    from roadie.training.record import TrainingResult
    from roadie.training.rows import DataError
    from roadie.training.run import train
    from roadie.training.summary import AdapterSummary, summarise

__all__ = [
    "AdaptedModel",
    "AdapterSummary",
    "DataError",
    "Decoding",
    "MergeResult",
    "ModelSource",
    "NamedAdapter",
    "Prompt",
    "Recipe",
    "TrainingResult",
    "adapter_folder",
    "continue_prompts",
    "generate",
    "load_adapted",
    "load_model",
    "load_tokenizer",
    "merge_to_disk",
    "parse_adapters",
    "summarise",
    "train",
]

_MODULES = {
    "adapters": ("AdaptedModel", "NamedAdapter", "adapter_folder", "load_adapted", "parse_adapters"),
    "generation": ("Decoding", "continue_prompts", "generate"),
    "merging": ("MergeResult", "merge_to_disk"),
    "models": ("ModelSource", "load_model", "load_tokenizer"),
    "prompts": ("Prompt",),
    "recipe": ("Recipe",),
    "record": ("TrainingResult",),
    "rows": ("DataError",),
    "run": ("train",),
    "summary": ("AdapterSummary", "summarise"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
