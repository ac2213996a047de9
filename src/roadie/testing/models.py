"""Small models with adapters that do something."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roadie.adapter import Adapter, LayerParameters
from roadie.rotation import Variant, parameter_size


def tiny_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """A LlamaForCausalLM with random weights and two layers of 64 (settings: fields of LlamaConfig); equal for equal seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": 128, "max_position_embeddings": 128, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def randomise(model: nn.Module, *, seed: int = 0, scale: float = 0.3, adapter: str | None = None) -> nn.Module:
    """Add normal noise of `scale` to theta and alpha of all RoAd adapters (or of one); equal for equal seeds and names.

    Works on any implementation that calls its parameters road_theta and road_alpha.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".road_" not in f".{name}" or (adapter is not None and not name.endswith(f".{adapter}")):
                continue
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return model


def random_adapter(
    model: nn.Module, seed: int, *, scale: float = 0.2, variant: str = "road_1", group_size: int = 16
) -> Adapter:
    """An adapter of every linear layer of a plain model but the last; parameters are normal around the identity's.

    Equal for equal seeds and models. group_size has to divide the outputs of every layer.
    """
    generator = torch.Generator().manual_seed(seed)
    output: Any = getattr(model, "get_output_embeddings", None)
    head = output() if output is not None else None
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            size = parameter_size(variant, module.out_features)
            theta, alpha = (torch.randn(size, generator=generator) * scale for _ in range(2))
            layers[path] = LayerParameters(theta, 1 + alpha, Variant.parse(variant), group_size)
    return Adapter(layers, {"peft_type": "ROAD", "variant": variant, "group_size": group_size})
