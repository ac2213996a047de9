"""A whole Llama of about 160M parameters with random weights, all linear layers of its blocks adapted.

The training step is one forward with a loss and one backward, no optimizer. The frozen model it is compared with lets
the gradient flow from its input embeddings, so that its backward runs through every layer; so do the rivals. Prefill and
decoding (one token a row, with a cache) are without gradients.

Legend: B rows of the batch, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Budget, Run, measure
from benchmarks.memory import bytes_kept
from benchmarks.rivals import FROZEN, PRECISIONS, RIVALS, ROADIE, adapt, sharing_copy, trained
from benchmarks.workloads import entry
from benchmarks.workloads.decoding import static_step
from benchmarks.workloads.layer import FORWARD, PASSES
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING

PREFILL, DECODE, TRAINING = "prefill", "decode", "training step"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a Llama; the defaults have 162 million parameters."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 32000
    kv_heads: int | None = None


@dataclass(frozen=True)
class ModelCase:
    """What is done with which batch; decoding: `tokens` are in the cache already. variant: of both RoAds."""

    mode: str
    precision: str
    rows: int
    tokens: int
    variant: str = "road_1"
    size: ModelSize = ModelSize()


def llama(size: ModelSize, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A LlamaForCausalLM with random weights; equal for equal sizes."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        num_key_value_heads=size.kv_heads or size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
    )
    # Made on the device and in the dtype at once: eight billion float32 weights would not fit beside anything.
    with torch.random.fork_rng(), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rivals_of(case: ModelCase, names: tuple[str, ...] = RIVALS, device: str = "cpu") -> dict[str, nn.Module]:
    """The models that are compared, over the same base weights."""
    precision = PRECISIONS[case.precision]
    base = llama(case.size, precision.base, device)
    return {name: adapt(sharing_copy(base), name, TARGETS, precision, case.variant) for name in names}


def run(case: ModelCase, budget: Budget, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Time the models with torch's default number of threads; for a training step also count the bytes kept."""
    rounds = measure({name: once(model, case) for name, model in models.items()}, budget)
    moved = bytes_moved(case, models[FROZEN])
    result = entry("model", asdict(case), rounds, base=FROZEN, ours=ROADIE, bytes_moved=moved)
    result["parameters"] = sum(parameter.numel() for parameter in models[FROZEN].parameters())
    if case.mode == TRAINING:
        result["bytes"] = {name: activations_kept(model, case) for name, model in models.items()}
    return result


def once(model: nn.Module, case: ModelCase) -> Run:
    """What is timed."""
    return {PREFILL: prefill, DECODE: decode, TRAINING: training_step}[case.mode](model, case)


def prefill(model: Any, case: ModelCase) -> Run:
    """A forward over B x T tokens that fills a cache; logits of the last token alone."""
    tokens_BT = _tokens(model, case)

    def once() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1).logits

    return once


def decode(model: Any, case: ModelCase) -> Run:
    """A forward over one token a row, with T tokens in the cache, which is as long again afterwards."""
    return static_step(model, case.rows, case.tokens)


def training_step(model: Any, case: ModelCase) -> Run:
    """Loss and backward: gradients of the embeddings' output and of the adapter."""
    parameters = trained(model)

    def once() -> tuple[Tensor, ...]:
        with flowing_from_embeddings(model) as embedded:
            loss = forward_with_loss(model, case)
        return torch.autograd.grad(loss, [*embedded, *parameters])

    return once


def forward_with_loss(model: Any, case: ModelCase) -> Tensor:
    """The mean cross-entropy over B x T random tokens."""
    tokens_BT = _tokens(model, case)
    return model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss


@contextmanager
def flowing_from_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Within the block the embeddings' output requires a gradient; gives the list of these outputs."""
    outputs: list[Tensor] = []

    def require(module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs.append(output.requires_grad_())

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield outputs
    finally:
        handle.remove()


def activations_kept(model: nn.Module, case: ModelCase) -> int:
    """Bytes kept between the forward and the backward of a training step."""
    with flowing_from_embeddings(model):
        return bytes_kept(lambda: forward_with_loss(model, case), [*model.parameters(), *model.buffers()])


def bytes_moved(case: ModelCase, frozen: nn.Module) -> int:
    """Bytes read and written by rotating every adapted output as a pass of its own."""
    tokens = case.rows * (1 if case.mode == DECODE else case.tokens)
    passes = PASSES[LAYER_TRAINING if case.mode == TRAINING else FORWARD]
    return passes * tokens * sum(widths(frozen)) * PRECISIONS[case.precision].base.itemsize


def widths(frozen: nn.Module) -> list[int]:
    """The out features of each layer that adapters are added to."""
    return [module.out_features for name, module in frozen.named_modules() if name.rpartition(".")[2] in TARGETS]


def _tokens(model: nn.Module, case: ModelCase) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(case.size.vocabulary, (case.rows, case.tokens), generator=generator)
    return tokens_BT.to(next(model.parameters()).device)
