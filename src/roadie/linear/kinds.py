"""Which modules are linear layers: torch's, its subclasses, and transformers' Conv1D; and their sizes."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer; those that PEFT or a quantisation wraps otherwise are none here."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def out_features(module: Any) -> int | None:
    """D, the outputs of a linear layer; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if _is_conv1d(module) else None


def in_features(module: Any) -> int:
    """The inputs of a linear layer."""
    return module.in_features if isinstance(module, nn.Linear) else int(module.nx)


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
