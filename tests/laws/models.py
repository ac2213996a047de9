"""Models of a few linear layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def linear_chain(
    *sizes: int, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0, conv1d: bool = False
) -> nn.Sequential:
    """Linear layers "first", "second", "third" from sizes[0] to sizes[1] features, and so on; equal for equal seeds.

    conv1d: transformers' Conv1D (which always has a bias). Weights are drawn from N(0, 1/in), biases from N(0, 1).
    """
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, width, out_features in zip(("first", "second", "third"), sizes, sizes[1:], strict=False):
        layer: Any = Conv1D(out_features, width) if conv1d else nn.Linear(width, out_features, bias=bias)
        for parameter in layer.parameters():
            scale = width**-0.5 if parameter.dim() == 2 else 1.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        layers[name] = layer
    return nn.Sequential(layers).to(dtype)
