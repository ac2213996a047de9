"""Adapters made for these tests, and the dense matrices they stand for."""

from __future__ import annotations

import torch

from roadie.adapter import Adapter, LayerParameters
from roadie.rotation import parameter_size, to_dense

SIZES = {"self_attn.q_proj": 32, "self_attn.v_proj": 16, "mlp.down_proj": 32}


def drawn(variant="road_1", seed=0, spread=0.3, group_size=8, layers=2, **config) -> Adapter:
    """An adapter of a small transformer, its angles and scales normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for depth in range(layers):
        for name, outputs in SIZES.items():
            size = parameter_size(variant, outputs)
            theta = spread * torch.randn(size, generator=generator, dtype=torch.float64)
            alpha = 1 + 0.3 * spread * torch.randn(size, generator=generator, dtype=torch.float64)
            parts[f"model.layers.{depth}.{name}"] = LayerParameters(theta, alpha, variant, group_size)
    return Adapter(parts, {"variant": variant, "group_size": group_size, "base_model_name_or_path": "a/base", **config})


def one_layer(theta, alpha, variant="road_1", group_size=2, path="model.layers.0.q_proj") -> Adapter:
    theta, alpha = (torch.tensor(values, dtype=torch.float64) for values in (theta, alpha))
    return Adapter({path: LayerParameters(theta, alpha, variant, group_size)})


def dense(adapter: Adapter, path: str) -> torch.Tensor:
    """R of one layer, ``[D, D]``; what it adds to the identity is this minus the identity."""
    return to_dense(adapter.layers[path].rotation)


def change(adapter: Adapter, path: str, outputs: int) -> torch.Tensor:
    """R - I of one layer, 0 where the adapter does not have it."""
    if path not in adapter.layers:
        return torch.zeros(outputs, outputs, dtype=torch.float64)
    return dense(adapter, path) - torch.eye(outputs, dtype=torch.float64)
