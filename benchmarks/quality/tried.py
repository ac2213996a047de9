"""Options that were tried and are not part of roadie: what each would bring, beside methods that are there.

Plain modules around the layers, for this measurement alone; they neither save, merge nor mix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Task

OUTPUT_LAYER = "lm_head"


class Shifted(nn.Module):
    """A layer, and a trained vector ``[D]`` that is added to its output ``[..., D]``; starts at zero."""

    def __init__(self, layer: nn.Module, out_features: int) -> None:
        super().__init__()
        self.layer = layer
        self.shift = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Of what the layer takes."""
        shifted: Tensor = self.layer(x) + self.shift
        return shifted


def shift_layers(model: nn.Module, task: Task) -> nn.Module:
    """Every adapted layer gets a shift."""
    for path, layer in [(path, module) for path, module in model.named_modules() if hasattr(module, "road_theta")]:
        _replace(model, path, Shifted(layer, layer.out_features))
    return model


def shift_output_layer(model: nn.Module, task: Task) -> nn.Module:
    """The language model's last layer gets a shift: a number a token of the vocabulary."""
    path = next(path for path, _ in model.named_modules() if path.endswith(OUTPUT_LAYER))
    layer = model.get_submodule(path)
    _replace(model, path, Shifted(layer, layer.out_features))
    return model


def train_norms(model: nn.Module, task: Task) -> nn.Module:
    """The weights of all normalisations are trained too."""
    for norm in _norms(model):
        norm.weight.requires_grad_(True)
    return model


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith("Norm"))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
