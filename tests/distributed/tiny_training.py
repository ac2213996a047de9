"""What the programs of this folder train: a tiny Llama, adapted at random, for a few steps, whole or in parts.

Imported by programs that torchrun starts in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import roadie

VARIANTS = ("road_1", "road_2", "road_4")
ROWS, TOKENS, STEPS, STOP, RATE = 4, 12, 4, 2, 1e-2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)


def base_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype).eval()


def adapted(variant: str, dtype: torch.dtype = torch.float64, base: Any = None, seed: int = 1, **config: Any) -> Any:
    """The same model with the same random adapter each time; its adapter in float32 where the base is in half precision."""
    settings = {"group_size": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}
    model = roadie.get_peft_model(base or base_model(dtype), roadie.RoadConfig(variant=variant, **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_theta" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / 4)
            if "road_alpha" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, dtype=torch.float64) / 8)
    return model


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(CONFIG.vocab_size, (ROWS, TOKENS), generator=generator)


@dataclass
class Trace:
    """Losses of all steps, the gradients of the first one by name, and the parameters at the end."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def named(model: Any) -> dict[str, Any]:
    """The parameters of the adapter, by names that wrappers do not change."""
    found = {name.replace("module.", ""): parameter for name, parameter in model.named_parameters() if "road_" in name}
    sites = 2 if any("road_input" in name for name in found) else 1
    assert len(found) == sites * 2 * 2 * len(TARGETS), sorted(found)
    return found


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    trace: Trace,
    first: int = 0,
    last: int = STEPS,
    rows: slice = slice(None),
) -> Trace:
    """Steps `first` to `last`; each process gives its rows."""
    for step in range(first, last):
        ids = batch(step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            trace.gradients = {name: whole(parameter.grad) for name, parameter in named(model).items()}
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append(float(loss.detach()))
    trace.parameters = {name: whole(parameter) for name, parameter in named(model).items()}
    return trace


def reference(variant: str, dtype: torch.dtype = torch.float64) -> Trace:
    """What one process makes of it."""
    model = adapted(variant, dtype)
    return train(model, optimizer_of(model), Trace())


def save(trace: Trace, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"losses": trace.losses, "gradients": trace.gradients, "parameters": trace.parameters}, path)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batch(99)).logits.float()
