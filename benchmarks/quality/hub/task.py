"""From a configuration to a task that can be trained: model, tokenizer and rows, found before the first run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from benchmarks.quality.hub.data import read_parts
from benchmarks.quality.hub.encoding import Encoded, Encoder
from benchmarks.quality.hub.evaluation import Judge
from benchmarks.quality.hub.settings import Model, TaskSettings
from benchmarks.quality.tasks import CLASSIFICATION, LANGUAGE, Splits, Task
from roadie.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """A task, what measures its models, and the settings it was made of."""

    name: str
    settings: TaskSettings
    task: Task
    judge: Judge


def prepare(name: str, settings: TaskSettings, root: Path, device: str) -> Prepared:
    """The task of a configuration; raises `ConfigError` where model, tokenizer or data cannot be had."""
    tokenizer = tokenizer_of(settings.model)
    encoder = Encoder(settings.rows, tokenizer)
    parts = read_parts(settings, root)
    training, is_language = settings.training, settings.model.kind == "causal-language-model"
    train = Encoded(parts["train"], encoder)
    task = Task(
        name=name,
        kind=LANGUAGE if is_language else CLASSIFICATION,
        title=settings.title,
        model=lambda: base_model(settings.model, tokenizer, device, settings.rows.labels),
        splits=Splits(train, (), ()),
        pad_id=_pad_id(tokenizer),
        targets=settings.model.targets if isinstance(settings.model.targets, str) else list(settings.model.targets),
        steps=training.steps or _steps(len(train), training.epochs or 0, training.batch_rows * training.accumulation),
        batch_rows=training.batch_rows,
        head=settings.model.head,
        head_rate=training.head_rate,
        predicts_numbers=settings.rows.labels == "number",
        facts={"rows": {part: len(table) for part, table in parts.items()}},
    )
    return Prepared(name, settings, task, Judge(settings, encoder, parts))


def tokenizer_of(model: Model) -> Any:
    """The tokenizer that comes with a model."""
    return _loaded(model, lambda where: AutoTokenizer.from_pretrained(where, revision=model.revision))


def width_of(model: Model) -> int:
    """How many elements a hidden state of the model has."""
    config = _loaded(model, lambda where: AutoConfig.from_pretrained(where, revision=model.revision))
    return int(config.get_text_config().hidden_size)


def base_model(
    wanted: Model, tokenizer: Any, device: str, labels: tuple[str, ...] | Literal["number"] | None = None
) -> nn.Module:
    """A fresh copy of the base model on a device, in the dtype of the configuration; labels: as `Rows` has them."""
    more: dict[str, Any] = {}
    kind = AutoModelForCausalLM
    if labels is not None:
        kind = AutoModelForSequenceClassification
        more = {
            "num_labels": 1 if labels == "number" else len(labels),
            "ignore_mismatched_sizes": True,
        }  # the head is fresh
    logging.set_verbosity_error()  # it would tell of the fresh head each time, and of the weights as they come
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("medium" if wanted.products == "bfloat16" else "highest")
    model = _loaded(
        wanted,
        lambda where: kind.from_pretrained(
            where,
            revision=wanted.revision,
            dtype=DTYPES[wanted.dtype],
            attn_implementation=wanted.attention,
            **more,
        ),
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _pad_id(tokenizer)
    if "bfloat16" in (wanted.products, wanted.dtype) and labels is None:
        model.get_output_embeddings().register_forward_pre_hook(_made_contiguous)
    names = [name for name, _ in model.named_parameters()]
    lacking = [part for part in wanted.head if not any(name.startswith(f"{part}.") for name in names)]
    if lacking:
        heads = sorted({name.partition(".")[0] for name in names})
        raise ConfigError(
            f"got model.head {', '.join(lacking)}; wanted modules of {wanted.name}, as {', '.join(heads)}; correct head"
        )
    return model.to(device)


def _made_contiguous(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a layer is given, in one piece of memory.

    When text is generated the last layer gets the last token of each row, a slice. On a CPU products in bfloat16 of a slice
    copy the layer's weight for every row: 9 GB for 80 rows and 49,152 tokens of width 576.
    """
    return tuple(one.contiguous() for one in arguments)


def _loaded(model: Model, load: Callable[[str], Any]) -> Any:
    try:
        return load(model.name)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"got no model {model.name}: {reason} Wanted a folder, or a model of the hub; check the name, that the hub can "
            "be reached (or the model is in the cache), and for gated models that you have access: hf auth login"
        ) from error


def _pad_id(tokenizer: Any) -> int:
    """The token that fills rows; where there is none the end of the text, which attention never sees."""
    found = [one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None]
    return int(found[0])


def _steps(rows: int, epochs: float, rows_of_a_step: int) -> int:
    return max(1, math.ceil(rows * epochs / rows_of_a_step))
