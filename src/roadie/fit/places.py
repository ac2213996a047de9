"""Which tensors of a model are the weights of linear layers, told from names, shapes and config.json alone.

A linear layer is a tensor ``<path>.weight`` of two dimensions that is neither an embedding nor the output head: no part of
its path names one, and outside of numbered blocks it has not as many rows as the vocabulary has words. Its bias is
``<path>.bias``. Weights are ``[outputs, inputs]``, but ``[inputs, outputs]`` in models that transformers builds of Conv1D
(GPT-2 and its like).

Where that is not enough, because a model names its layers otherwise or calls its modules otherwise than its tensors, whoever
has the model says it: a `Place` for each linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from roadie.fit.weights import StoredTensor, Weights

# Parts of module paths in the manner of transformers, Megatron and fairseq.
_EMBEDS = re.compile(
    r"(^|[._])(emb|embed|embeds|embedder|embeddings?|wte|wpe|wpte)([._]|$)"
    r"|(^|\.)(shared|lm_head|embed_out|output_projection|relative_attention_bias)$",
    re.IGNORECASE,
)
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_OF_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclass(frozen=True)
class Place:
    """A linear layer: the path of its module in the model, and whether its weight is stored as ``[inputs, outputs]``."""

    path: str
    transposed: bool = False


@dataclass(frozen=True)
class LinearTensors:
    """The tensors of a linear layer and its place; bias: None where it has none."""

    place: Place
    weight: StoredTensor
    bias: StoredTensor | None

    @property
    def outputs(self) -> int:
        """D."""
        return self.weight.shape[1 if self.place.transposed else 0]

    @property
    def columns(self) -> int:
        """Inputs, and one for the bias."""
        return self.weight.shape[0 if self.place.transposed else 1] + (self.bias is not None)


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name embeds, or is the output head."""
    return _EMBEDS.search(name.removesuffix(".weight")) is not None


def linear_tensors(weights: Weights, places: Mapping[str, Place] | None = None) -> Iterator[LinearTensors]:
    """The linear layers of a model in the order of its files; places: by path in the file, None: told from the names."""
    for name, stored in weights.tensors.items():
        path = name.removesuffix(".weight")
        if path == name or len(stored.shape) != 2:
            continue
        place = _guessed(path, stored, weights.config) if places is None else places.get(path)
        if place is not None:
            yield LinearTensors(place, stored, weights.tensors.get(f"{path}.bias"))


def module_paths(names: Iterable[str]) -> set[str]:
    """The modules that have tensors of these names."""
    return {name.rpartition(".")[0] for name in names}


def _guessed(path: str, stored: StoredTensor, config: Mapping[str, Any]) -> Place | None:
    of_words = stored.shape[0] in _vocabulary_sizes(config) and not _IN_A_BLOCK.search(path)
    if of_words or _EMBEDS.search(path):
        return None
    return Place(path, config.get("model_type") in _CONV1D_MODELS and _OF_CONV1D.search(path) is not None)


def _vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    text = config.get("text_config")
    found = (part.get("vocab_size") for part in (config, text) if isinstance(part, Mapping))
    return {size for size in found if isinstance(size, int)}
