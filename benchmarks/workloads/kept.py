"""Bytes kept for backward by an adapted layer, and by what follows it, beyond what the same frozen modules keep.

Counted at two numbers of tokens: the difference is what grows with the tokens (bytes for each element of the adapted
outputs), the rest is fixed (tables and cos and sin of the parameters). Parameters are not counted; the module's input is,
where the adapter keeps it and the frozen modules do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRotaryEmbedding

from benchmarks.memory import bytes_kept
from benchmarks.rivals import FROZEN, PEFT_ROAD, PRECISIONS, RIVALS, ROADIE, Precision, adapt

VARIANTS = ("road_1", "road_2", "road_4")
LINEAR, SILU, RELU = "linear", "linear -> silu", "linear -> relu"
MLP, BLOCK = "Llama MLP (gate, up)", "Llama block (all linear)"
# Partitions forward and backward as inductor does, but needs no compiler and a tenth of its time.
PARTITIONED = "aot_eager_decomp_partition"
INDUCTOR = "inductor"
BLOCK_OUTPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), "width"),
    **dict.fromkeys(("gate_proj", "up_proj"), "out_features"),
}


@dataclass(frozen=True)
class KeptCase:
    """What is built, in which precision, and how it runs ("eager" or a backend of torch.compile)."""

    what: str
    precision: str
    mode: str = "eager"
    width: int = 512
    out_features: int = 1024
    tokens: int = 64


def run(case: KeptCase) -> dict[str, Any]:
    """The record's entry: for each rival (and variant) bytes per element of the adapted outputs, and fixed bytes."""
    few, many = ({name: _kept(case, name, factor * case.tokens) for name in _names(case)} for factor in (1, 2))
    elements = _adapted_outputs(case) * case.tokens
    result = {}
    for name in few:
        if name == FROZEN:
            continue
        extra = [kept[name] - kept[FROZEN] for kept in (few, many)]
        result[name] = {"per_element": (extra[1] - extra[0]) / elements, "fixed": 2 * extra[0] - extra[1]}
    return {"workload": "kept", "case": asdict(case), "bytes": result}


def _names(case: KeptCase) -> list[str]:
    """The rivals, RoAd in every variant; compiled: only ours, and one variant where compiling is slow."""
    ours = [f"{ROADIE} {variant}" for variant in VARIANTS]
    if case.mode != "eager":
        slow = case.mode == INDUCTOR or case.what == BLOCK
        return [FROZEN, *(ours[:1] if slow else ours)]
    theirs = [f"{PEFT_ROAD} {variant}" for variant in VARIANTS]
    return [FROZEN, *ours, *theirs, *(name for name in RIVALS if name not in (FROZEN, ROADIE, PEFT_ROAD))]


def _kept(case: KeptCase, name: str, tokens: int) -> int:
    precision = PRECISIONS[case.precision]
    rival, _, variant = name.partition(" road_")
    make, targets = _MODULES[case.what]
    model = adapt(make(case, precision), rival, targets, precision, f"road_{variant}" if variant else "road_1")
    x = torch.randn(1, tokens, case.width).to(precision.base).requires_grad_()
    call: Callable[[Tensor], Tensor] = _bare(model)
    if case.mode != "eager":
        torch._dynamo.reset()
        # fullgraph: a graph break raises. The whole program runs once before its bytes are counted.
        call = torch.compile(call, backend=case.mode, fullgraph=True, dynamic=False)
        call(x).sum().backward()
    return bytes_kept(lambda: call(x), model.parameters())


def _bare(model: Any) -> nn.Module:
    """The adapted module itself, without PeftModel around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _chain(*after: nn.Module) -> Callable[[KeptCase, Precision], nn.Module]:
    def make(case: KeptCase, precision: Precision) -> nn.Module:
        chain = nn.Sequential()
        chain.add_module("linear", nn.Linear(case.width, case.out_features, bias=False))
        for module in after:
            chain.add_module("after", module)
        return chain.to(precision.base)

    return make


def _llama_mlp(case: KeptCase, precision: Precision) -> nn.Module:
    config = LlamaConfig(hidden_size=case.width, intermediate_size=case.out_features)
    return LlamaMLP(config).to(precision.base)


class _Block(nn.Module):
    """A decoder layer with its rotary embedding, so that it is a function of the hidden states alone."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)


def _llama_block(case: KeptCase, precision: Precision) -> nn.Module:
    config = LlamaConfig(hidden_size=case.width, intermediate_size=case.out_features, num_attention_heads=8)
    config._attn_implementation = "sdpa"
    return _Block(config).to(precision.base)


_MODULES: dict[str, tuple[Callable[[KeptCase, Precision], nn.Module], list[str]]] = {
    LINEAR: (_chain(), ["linear"]),
    SILU: (_chain(nn.SiLU()), ["linear"]),
    RELU: (_chain(nn.ReLU()), ["linear"]),
    MLP: (_llama_mlp, ["gate_proj", "up_proj"]),
    BLOCK: (_llama_block, list(BLOCK_OUTPUTS)),
}


def _adapted_outputs(case: KeptCase) -> int:
    return sum(
        case.width if BLOCK_OUTPUTS.get(name) == "width" else case.out_features for name in _MODULES[case.what][1]
    )
