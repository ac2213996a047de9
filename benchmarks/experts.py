"""What rotations of stacked experts cost: a random Qwen3-MoE, 8 of 64 experts a token, beside PEFT's LoRA of the same parameters.

    python -m benchmarks.experts              two layers of width 1024, 200M parameters: five minutes
    python -m benchmarks.experts --small      a model of 3M parameters, to see that it runs

Experts alone are adapted. Timed are a forward without gradient and a step (forward, loss, backward), in interleaved rounds of one
process, in seconds of the processor, on one thread:

    frozen                  without adapters; its step goes to the embeddings
    each | shared           one adapter with a rotation for each expert, or one that all of a layer share
    each, 32 adapters       every row of the batch its own
    LoRA r=8                by target_parameters, one adapter: PEFT mixes no rows there

Beside the times stand the bytes that autograd keeps for backward.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

import roadie
from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.memory import bytes_kept
from benchmarks.rivals import sharing_copy
from benchmarks.statistics import summarise
from benchmarks.workloads.model import flowing_from_embeddings
from roadie.testing.models import randomise

FROZEN, EACH, SHARED, LORA = "frozen", "each", "shared", "LoRA r=8"
ROWS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each table")
    options = parser.parse_args(arguments)
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = model(128 if options.small else 1024)
        for tokens in (1, 16):
            print(report(base, tokens, options.seconds))
    return 0


def model(hidden: int) -> Any:
    """A frozen mixture of 64 experts in float32, whose experts are computed by the default implementation."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": hidden // 8, "num_hidden_layers": 2}
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": hidden // 2}
    config = Qwen3MoeConfig(vocab_size=1024, hidden_size=hidden, **heads, **experts)
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def rivals(base: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Models that share the base's weights, and what they are called with besides."""
    many = adapted(base, "each", ROWS)
    names = [f"a{number}" for number in range(ROWS)]
    lora = peft.LoraConfig(r=8, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    return {
        FROZEN: (sharing_copy(base), {}),
        EACH: (adapted(base, "each", 1), {}),
        SHARED: (adapted(base, "shared", 1), {}),
        f"{EACH}, {ROWS} adapters": (many, {"adapter_names": names}),
        LORA: (peft.get_peft_model(sharing_copy(base), lora), {}),
    }


def adapted(base: Any, kind: str, count: int) -> Any:
    """So many adapters of experts alone, far from the identity, all of them trained."""
    config = {"target_modules": [], "target_experts": kind, "group_size": 64}
    made: Any = roadie.get_peft_model(sharing_copy(base), roadie.RoadConfig(**config), adapter_name="a0")
    for number in range(1, count):
        made.add_adapter(f"a{number}", roadie.RoadConfig(**config))
    for name, parameter in randomise(made, scale=0.02).named_parameters():
        parameter.requires_grad_(".road_" in name)
    return made


def report(base: Any, tokens: int, seconds: float) -> str:
    """A table for rows of so many tokens."""
    ids = torch.randint(1024, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    models = rivals(base)
    budget = Budget(seconds, warm_up_calls=1, processor_time=True)
    forwards = summarise(measure({name: forward(*one, ids) for name, one in models.items()}, budget), FROZEN, None)
    steps = summarise(measure({name: step(*one, ids) for name, one in models.items()}, budget), FROZEN, None)
    lines = [
        f"{sum(p.numel() for p in base.parameters()) / 1e6:.0f}M parameters, {ROWS} rows of {tokens} tokens; processor time, ms",
        f"{'':20}{'forward':>12}{'/ frozen':>22}{'step':>12}{'/ frozen':>22}{'kept, MiB':>12}",
    ]
    for name, (one, arguments) in models.items():
        kept = bytes_kept(lambda one=one, arguments=arguments: loss(one, arguments, ids), one.parameters()) / 2**20
        cells = "".join(f"{each[name]['median_ms']:12.1f}{_ratio(each[name]):>22}" for each in (forwards, steps))
        lines.append(f"{name:20}{cells}{kept:12.1f}")
    return "\n".join([*lines, ""])


def _ratio(one: dict[str, Any]) -> str:
    ratio = one.get("ratio")
    return "" if ratio is None else f"{ratio['value']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"


def loss(one: Any, arguments: dict[str, Any], ids: Tensor) -> Tensor:
    """With its graph; that of a frozen model from the embeddings on."""
    if any(parameter.requires_grad for parameter in one.parameters()):
        return one(input_ids=ids, use_cache=False, **arguments).logits.square().mean()
    with flowing_from_embeddings(one):
        return one(input_ids=ids, use_cache=False).logits.square().mean()


def forward(one: nn.Module, arguments: dict[str, Any], ids: Tensor) -> Run:
    """Without gradient."""

    @torch.no_grad()
    def once() -> Tensor:
        return one(input_ids=ids, use_cache=False, **arguments).logits

    return once


def step(one: nn.Module, arguments: dict[str, Any], ids: Tensor) -> Run:
    """Forward and backward; gradients are thrown away."""

    def once() -> None:
        loss(one, arguments, ids).backward()
        one.zero_grad()

    return once


if __name__ == "__main__":
    sys.exit(main())
