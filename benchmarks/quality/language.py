"""The embedded language model on kinds of text of the standard library that its pretraining never saw.

A kind's files are cut twice: held-out files are the test split; of the others a fifth (by characters) is the validation
split. A long paragraph that is in two splits is taken out of the one that is learnt from (`roadie.embedded.corpus`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from benchmarks.quality.tasks import LANGUAGE, Row, Splits, Task
from roadie import embedded
from roadie.embedded import corpus

ROW_TOKENS = 128
MEASURED_ROWS = 64
STEPS, BATCH_ROWS = 60, 8


def language_task(kind: str) -> Task:
    """The task "language-<kind>"; `kind` is a name of `corpus.KINDS`."""
    outer = corpus.split(kind)
    inner = corpus.cut(kind, outer.train)
    splits = Splits(_rows(inner.train), _spread(_rows(inner.held_out)), _spread(_rows(outer.held_out)))
    files = {"train": len(inner.train), "validation": len(inner.held_out), "test": len(outer.held_out)}
    tokenizer = _tokenizer()
    return Task(
        name=f"language-{kind}",
        kind=LANGUAGE,
        title=f"next tokens of {kind}",
        model=_model,
        splits=splits,
        pad_id=tokenizer.pad_token_id,
        targets="all-linear",
        steps=STEPS,
        batch_rows=BATCH_ROWS,
        facts={
            "files": files,
            "rows": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
            "row_tokens": ROW_TOKENS,
        },
    )


def _model() -> nn.Module:
    return embedded.load_model()


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return embedded.load_tokenizer()


def _rows(documents: Sequence[corpus.Document]) -> list[Row]:
    """Documents joined by `</s>`, cut into rows of `<s>` and ROW_TOKENS - 1 tokens; the rest is dropped."""
    tokenizer = _tokenizer()
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    window = ROW_TOKENS - 1
    cuts = [[tokenizer.bos_token_id, *tokens[start : start + window]] for start in range(0, len(tokens), window)]
    return [{"input_ids": cut, "labels": cut} for cut in cuts if len(cut) == ROW_TOKENS]


def _spread(rows: list[Row]) -> list[Row]:
    """MEASURED_ROWS of the rows, evenly spread over the files."""
    count = min(MEASURED_ROWS, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]
