"""A whole model: a decoding step and a training step of a checkpoint, all linear layers of its blocks adapted.

A decoding step is a forward over one token a row with a cache, which is cropped back afterwards, so that every call does the
same. A training step is a forward with a loss and a backward that leaves gradients in the adapter's parameters, without an
optimizer. The frozen model it is compared with lets a gradient flow from its input embeddings, so that its backward runs
through every layer; so do the rivals. "One token a row" is a forward without a cache.

Where a model has several adapters, row b of each batch names adapter ``b mod adapters``, by `adapter_names`; in training, which
PEFT does not let name adapters, by `roadie.rows`. Such adapters have the dtype of the base, since PEFT's RoAd cannot mix others.

Legend: B rows of the batch, T tokens a row, H features of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import roadie
from benchmarks.harness import Budget, Run, measure, threads
from benchmarks.rivals import (
    FROZEN,
    PEFT_IA3,
    PEFT_LORA,
    PEFT_ROAD,
    PRECISIONS,
    ROADIE,
    ROADIE_STAGES,
    Precision,
    adapt,
    adapted_layers,
    sharing_copy,
)
from benchmarks.workloads import entry
from benchmarks.workloads.adapters import with_adapters
from benchmarks.workloads.layer import FORWARD, PASSES
from benchmarks.workloads.layer import TRAINING as LAYER_TRAINING
from benchmarks.workloads.model import DECODE, TRAINING, ModelSize, llama

CHECKPOINT, RESIDENTS = "checkpoint", "residents"  # workloads: a checkpoint, and many adapters of a random Llama
ONE_TOKEN = "one token a row"
ALL_LINEAR = "all-linear"
NAMES = (FROZEN, ROADIE, ROADIE_STAGES, PEFT_ROAD, PEFT_LORA, PEFT_IA3)
MIXED_NAMES = (FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA)
ONLY_OURS = (FROZEN, ROADIE)

Models = dict[str, nn.Module]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers loads, or a random Llama of a size; name: what the record calls it."""

    name: str
    source: Path | ModelSize


@dataclass(frozen=True)
class WholeCase:
    """What is done with which batch; decoding: `tokens` are in the cache already. adapters: how many are resident."""

    mode: str
    precision: str
    rows: int
    tokens: int
    threads: int
    adapters: int = 1


@dataclass(frozen=True)
class Shapes:
    """What is done with a checkpoint. training_tokens: in one row; mixed_training: rows and tokens a row."""

    threads: tuple[int, ...] = (1, 2)
    rows: tuple[int, ...] = (1, 8, 32)
    context: int = 32
    training_tokens: tuple[int, ...] = (64, 256, 1024)
    adapters: int = 32
    mixed_rows: tuple[int, ...] = (8, 32)
    mixed_training: tuple[tuple[int, int], ...] = ((32, 8), (32, 32))


def cases(shapes: Shapes, precision: str) -> list[WholeCase]:
    """Everything that is done, steps of little work first: what comes last may be left out."""
    found = [
        *(
            WholeCase(DECODE, precision, rows, shapes.context, count)
            for count in shapes.threads
            for rows in shapes.rows
        ),
        *(WholeCase(TRAINING, precision, 1, T, count) for count in shapes.threads for T in shapes.training_tokens),
        *(WholeCase(DECODE, precision, rows, shapes.context, 1, shapes.adapters) for rows in shapes.mixed_rows),
        *(WholeCase(TRAINING, precision, rows, T, 1, shapes.adapters) for rows, T in shapes.mixed_training),
    ]
    return sorted(found, key=lambda case: (case.mode == TRAINING, tokens_in(case)))


def tokens_in(case: WholeCase) -> int:
    """The tokens that go through the model in one step."""
    return case.rows * (1 if case.mode == DECODE else case.tokens)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model on the CPU, frozen."""
    if isinstance(checkpoint.source, ModelSize):
        return llama(checkpoint.source, dtype).requires_grad_(False)
    return AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=dtype).requires_grad_(False).eval()


def single_models(base: nn.Module, precision: Precision, names: Sequence[str] = NAMES) -> Models:
    """The rivals over the weights of `base`, an adapter each, of the very same layers."""
    return _of_the_same_layers({name: adapt(sharing_copy(base), name, ALL_LINEAR, precision) for name in names})


def mixed_models(base: nn.Module, count: int, names: Sequence[str] = MIXED_NAMES) -> Models:
    """The rivals over the weights of `base`, with `count` random adapters each, of the very same layers."""
    adapted = {name: with_adapters(base, name, ALL_LINEAR, count) for name in names if name != FROZEN}
    return _of_the_same_layers({FROZEN: base, **adapted})


def _of_the_same_layers(models: Models) -> Models:
    layers = {name: set(adapted_layers(model)) for name, model in models.items() if name != FROZEN}
    assert all(layers.values()), f"nothing is adapted in {[name for name, paths in layers.items() if not paths]}"
    assert len({frozenset(paths) for paths in layers.values()}) == 1, f"the rivals adapt different layers: {layers}"
    return models


def run(workload: str, title: str, case: WholeCase, budget: Budget, models: Models) -> dict[str, Any]:
    """Time the models; title: what the record calls the base model."""
    names = (
        ONLY_OURS if case.adapters > 1 and case.mode == TRAINING else models
    )  # PEFT's models refuse to mix in training
    compared = {name: models[name] for name in names}
    with threads(case.threads), adapters_trained(compared, case.mode == TRAINING):
        rounds = measure({name: once(name, model, case) for name, model in compared.items()}, budget)
        moved = bytes_moved(case, models[ROADIE])
        made = entry(workload, asdict(case), rounds, base=FROZEN, ours=ROADIE, bytes_moved=moved)
    parameters = sum(parameter.numel() for parameter in models[FROZEN].parameters())
    return {**made, "model": title, "parameters": parameters, "adapted_layers": len(adapted_layers(models[ROADIE]))}


@contextmanager
def adapters_trained(models: Models, trained: bool) -> Iterator[None]:
    """Within the block every adapter requires gradients, all that a model has, or none does; the base never does.

    Frozen is what an adapter is that PEFT has loaded for inference.
    """
    base = {id(parameter) for parameter in models[FROZEN].parameters()}
    adapters = [p for model in models.values() for p in model.parameters() if id(p) not in base]
    before = [parameter.requires_grad for parameter in adapters]
    for model in models.values():
        model.train(trained)
    for parameter in adapters:
        parameter.requires_grad_(trained)
    try:
        yield
    finally:
        for parameter, was in zip(adapters, before, strict=True):
            parameter.requires_grad_(was)


def once(name: str, model: nn.Module, case: WholeCase) -> Run:
    """What is timed."""
    is_named = case.adapters > 1 and name != FROZEN
    wishes = [f"a{row % case.adapters}" for row in range(case.rows)] if is_named else None
    return {DECODE: decode, ONE_TOKEN: one_token, TRAINING: training_step}[case.mode](model, case, wishes)


def decode(model: Any, case: WholeCase, wishes: list[str] | None) -> Run:
    """A forward over one token a row, with T tokens in the cache, which is as long again afterwards; gives ``[B, 1, V]``."""
    given = {} if wishes is None else {"adapter_names": wishes}
    seen_BT, next_B1 = tokens_of(model, case.rows, case.tokens + 1).split([case.tokens, 1], dim=1)
    with torch.no_grad():
        cache = model(input_ids=seen_BT, use_cache=True, **given).past_key_values

    def once() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=next_B1, past_key_values=cache, use_cache=True, **given).logits
        cache.crop(-1)
        return logits

    return once


def one_token(model: Any, case: WholeCase, wishes: list[str] | None) -> Run:
    """A forward over T tokens a row without a cache; gives the logits ``[B, T, V]``."""
    given = {} if wishes is None else {"adapter_names": wishes}
    tokens_BT = tokens_of(model, case.rows, case.tokens)

    def once() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens_BT, use_cache=False, **given).logits

    return once


def training_step(model: Any, case: WholeCase, wishes: list[str] | None) -> Run:
    """Loss and backward; gives the gradients of the embeddings ``[B, T, H]`` and of each parameter that requires one."""
    tokens_BT = tokens_of(model, case.rows, case.tokens)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def once() -> list[Tensor | None]:
        embedded_BTH = model.get_input_embeddings()(tokens_BT).detach().requires_grad_()
        with nullcontext() if wishes is None else roadie.rows(model, wishes):
            model(inputs_embeds=embedded_BTH, labels=tokens_BT, use_cache=False).loss.backward()
        gradients = [embedded_BTH.grad, *(parameter.grad for parameter in parameters)]
        for parameter in parameters:
            parameter.grad = None
        return gradients

    return once


def tokens_of(model: Any, rows: int, tokens: int) -> Tensor:
    """Random tokens ``[B, T]``, the same for all rivals."""
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()
    return torch.randint(embeddings.num_embeddings, (rows, tokens), generator=generator).to(embeddings.weight.device)


def bytes_moved(case: WholeCase, adapted: nn.Module) -> int:
    """Bytes read and written by rotating every adapted output as a pass of its own."""
    outputs = sum(layer.out_features for layer in adapted_layers(adapted).values())
    passes = PASSES[LAYER_TRAINING if case.mode == TRAINING else FORWARD]
    return passes * tokens_in(case) * outputs * PRECISIONS[case.precision].base.itemsize
