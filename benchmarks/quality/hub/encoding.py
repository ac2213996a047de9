"""From rows of a data set to rows of tokens; each is encoded when it is asked for, so that a large data set costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.hub.data import Raw, Table
from benchmarks.quality.hub.settings import Rows, names_in
from benchmarks.quality.tasks import IGNORED, Row
from roadie.errors import ConfigError
from roadie.training.encoding import Example, encode
from roadie.training.rows import Chat, Completion, Text

NO_LIMIT = 2**31


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: by the configuration's `rows`, with a tokenizer."""

    rows: Rows
    tokenizer: Any

    def row(self, raw: Raw) -> Row:
        """A row of tokens with labels: of every token (IGNORED where nothing is learnt), or one class or number."""
        return self._of_language(raw) if self.rows.prompt is not None else self._of_classes(raw)

    def prompt(self, raw: Raw) -> list[int]:
        """The tokens after which a model generates the answer; a prompt that is too long loses its beginning."""
        example = self._completion(raw, NO_LIMIT)
        end = next(place for place, label in enumerate(example.labels) if label != IGNORED)
        return list(example.input_ids[:end])[-self.rows.longest_tokens :]

    def reference(self, raw: Raw) -> str:
        """What the answer should have been."""
        return str(self.rows.reference or self.rows.answer).format_map(raw)

    def _of_language(self, raw: Raw) -> Row:
        example = self._completion(raw, self.rows.longest_tokens)
        if self.rows.learn == "all":
            whole = Text(self._prompt_text(raw) + self._answer_text(raw), "")
            example = encode([whole], self.tokenizer, self.rows.longest_tokens)[0]
        return {
            "input_ids": list(example.input_ids),
            "attention_mask": [1] * len(example.input_ids),
            "labels": list(example.labels),
        }

    def choices(self, raw: Raw) -> list[tuple[Row, bool]]:
        """The row once for each choice, which stands where the answer's column does; with whether it is the right one."""
        (column,) = set(names_in(str(self.rows.answer)))
        return [
            (self._of_language({**raw, column: choice}), choice == raw[column])
            for choice in raw[str(self.rows.choices)]
        ]

    def _completion(self, raw: Raw, longest_tokens: int) -> Example:
        prompt, answer = self._prompt_text(raw), self._answer_text(raw)
        record = (
            Chat((("user", prompt), ("assistant", answer)), "") if self.rows.chat else Completion(prompt, answer, "")
        )
        return encode([record], self.tokenizer, longest_tokens)[0]

    def _prompt_text(self, raw: Raw) -> str:
        return str(self.rows.prompt).format_map(raw)

    def _answer_text(self, raw: Raw) -> str:
        return str(self.rows.answer).format_map(raw)

    def _of_classes(self, raw: Raw) -> Row:
        rows = self.rows
        texts = [str(raw[name]) for name in (rows.text, rows.second_text) if name]
        encoded = self.tokenizer(*texts, truncation=True, max_length=rows.longest_tokens)
        return {**{name: list(values) for name, values in encoded.items()}, "labels": self._label(raw[str(rows.label)])}

    def _label(self, value: Any) -> int | float:
        """The number of a class: found among `labels` by name, or the number of a label that the data set counts itself."""
        labels = self.rows.labels
        if labels == "number":
            return _as_number(value)
        assert labels is not None
        if str(value) in labels:
            return labels.index(str(value))
        if isinstance(value, int) and 0 <= value < len(labels):
            return value
        raise ConfigError(
            f"got the label {value!r}; wanted one of {', '.join(labels)}; correct labels, or leave the row out"
        )


def _as_number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"got the label {value!r}; wanted a number; correct the column, or leave the row out")
    return number


class Encoded(Sequence[Row]):
    """The rows of a table as tokens."""

    def __init__(self, table: Table, encoder: Encoder) -> None:
        self.table, self.encoder = table, encoder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self.encoder.row(self.table[index])
