"""Files of tenants to rows that can be trained on; whatever is wrong with which line is said.

    supervised    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ..., "weight": 0 or 1}, ...]}
                  {"prompt": ..., "completion": ...}
    dpo           {"input": {"messages": [...]}, "preferred_output": [{"role": "assistant", "content": ...}],
                   "non_preferred_output": [{"role": "assistant", "content": ...}]}

A model without a chat template learns conversations in the plain form in which the server puts them to it: each answer is a row
of its own then, after everything that was said before it.

Legend: T tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from roadie.engine import TrainingRow
from roadie.errors import RoadieError
from roadie.serving.http.bodies import Message
from roadie.serving.http.prompts import ChatForm, plain_chat
from roadie.train_service.fine_tuning.limits import Limits
from roadie.training.encoding import IGNORED, Example, one_example
from roadie.training.preferences import one_pair
from roadie.training.rows import Chat, Completion, DataError, Preference, Record, Turns, parse_record

MAX_FAULTS, MAX_FAULT_CHARS = 100, 400
_SHOWN = 5
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens int32 ``[T]``, and which of them are learnt, bool ``[T]``; was_cut: whether there were more."""

    tokens: Tensor
    learnt: Tensor
    was_cut: bool

    @classmethod
    def of(cls, example: Example, was_cut: bool) -> Row:
        """A row of an example."""
        labels = torch.tensor(example.labels, dtype=torch.int32)
        return cls(torch.tensor(example.input_ids, dtype=torch.int32), labels != IGNORED, was_cut)

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt; nothing predicts the first."""
        return int(self.learnt[1:].sum())

    def weighted(self, weight: float) -> TrainingRow:
        """For the engine: each learnt token counts so much."""
        return TrainingRow(self.tokens[:-1], self.tokens[1:], self.learnt[1:] * weight)

    def given(self, gradient: float) -> TrainingRow:
        """For the engine: the gradient of a loss by the logprob of each learnt token."""
        return TrainingRow(self.tokens[:-1], self.tokens[1:], gradients=self.learnt[1:] * gradient)


Rows: TypeAlias = "tuple[Row, ...]"
"""What is learnt together: one row, or of a preference the better and the worse answer."""


class BadFile(RoadieError, ValueError):
    """Lines of a file that cannot be trained on, or none that can; faults: what is wrong, a sentence for each line."""

    def __init__(self, faults: Sequence[str], num_faults: int) -> None:
        more = f" (and {num_faults - _SHOWN} more)" if num_faults > _SHOWN else ""
        super().__init__("; ".join(faults[:_SHOWN]) + more)
        self.faults = tuple(faults)


class NotWanted(RoadieError):
    """Who asked for something waits for it no longer."""


@dataclass(frozen=True, eq=False)
class Reader:
    """What makes rows of lines. tokenizer: of this reader alone; max_tokens: of a row, which is cut where it is longer."""

    tokenizer: Any
    max_tokens: int
    limits: Limits

    def read(self, path: Path, method: str, is_wanted: Callable[[], bool] = lambda: True) -> list[Rows]:
        """All rows of a file. Raises `BadFile`, and `NotWanted` where `is_wanted`, asked now and then, says no."""
        rows: list[Rows] = []
        faults: list[str] = []
        num_faults = num_tokens = 0
        for number, line in enumerate(self._lines(path), start=1):
            try:
                found = self._rows(line, f"line {number}", method)
                num_tokens += sum(len(row.tokens) for each in found for row in each)
                rows += found
            except DataError as error:
                num_faults += 1
                faults += [str(error)[:MAX_FAULT_CHARS]] if num_faults <= MAX_FAULTS else []
            if number > self.limits.max_rows or num_tokens > self.limits.max_tokens:
                most = f"{self.limits.max_rows} lines and {self.limits.max_tokens} tokens"
                raise BadFile([f"line {number}: got more than {most}; wanted a shorter file"], 1)
            if number % 100 == 0 and not is_wanted():
                raise NotWanted("nobody waits for these rows any more")
        if faults:
            raise BadFile(faults, num_faults)
        if not rows:
            raise BadFile(["got a file without rows; wanted one JSON object a line"], 1)
        return rows

    def _lines(self, path: Path) -> Iterator[bytes]:
        most = self.limits.max_line_bytes
        with path.open("rb") as stream:
            while line := stream.readline(most + 1):
                yield line
                while len(line) > most and not line.endswith(b"\n"):
                    line = stream.readline(most + 1)

    def _rows(self, line: bytes, where: str, method: str) -> list[Rows]:
        if len(line) > self.limits.max_line_bytes:
            raise DataError(f"{where}: got more than {self.limits.max_line_bytes} bytes; wanted fewer; shorten it")
        if not line.strip():
            return []
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: got something that is not JSON ({str(error)[:100]}); wanted one object"
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: got a JSON {type(value).__name__}; wanted an object")
        if method == "dpo":
            pair, was_cut = one_pair(self._preference(value, where), self.tokenizer, self.max_tokens)
            return [tuple(Row.of(example, was_cut) for example in pair.examples)]
        records = self._records(value, where)
        return [(Row.of(*one_example(record, self.tokenizer, self.max_tokens)),) for record in records]

    def _records(self, value: Mapping[str, Any], where: str) -> list[Record]:
        if "messages" not in value:
            if not {"prompt", "completion"} <= set(value):
                raise DataError(
                    f"{where}: got keys {sorted(map(str, value))[:10]}; wanted messages, or prompt and completion; a "
                    "preference (input, preferred_output, non_preferred_output) is for method dpo"
                )
            return [parse_record(value, where)]
        _check_no_tools(value, where)
        turns, left_out = _turns(value["messages"], "messages", where)
        answers = [number for number, (role, _) in enumerate(turns) if role == "assistant" and number not in left_out]
        if not answers:
            raise DataError(f"{where}: got no message of the assistant that is to be learnt; wanted one at least")
        if self.tokenizer.chat_template:
            return [Chat(turns, where, left_out)]
        return [Completion(_plain(turns[:number]), f" {turns[number][1]}", where) for number in answers]

    def _preference(self, value: Mapping[str, Any], where: str) -> Preference:
        given = value.get("input")
        if not isinstance(given, dict) or not {"preferred_output", "non_preferred_output"} <= set(value):
            raise DataError(
                f"{where}: got keys {sorted(map(str, value))[:10]}; wanted input (an object with messages), preferred_output and "
                "non_preferred_output"
            )
        _check_no_tools(given, where)
        turns, _ = _turns(given.get("messages"), "input.messages", where)
        better, worse = (_turns(value[key], key, where)[0] for key in ("preferred_output", "non_preferred_output"))
        if any([role for role, _ in answer] != ["assistant"] for answer in (better, worse)):
            raise DataError(
                f"{where}: got outputs of several messages, or of others; wanted one of the assistant in each"
            )
        if self.tokenizer.chat_template:
            return Preference(turns, better, worse, where)
        return Preference(_plain(turns), f" {better[0][1]}", f" {worse[0][1]}", where)


def _plain(turns: Turns) -> str:
    return plain_chat([Message.model_validate({"role": role, "content": text}) for role, text in turns], ChatForm())


def _check_no_tools(value: Mapping[str, Any], where: str) -> None:
    for key in ("tools", "functions"):
        if value.get(key):
            raise DataError(f"{where}: got {key}; this server has none; leave them out")


def _turns(messages: object, key: str, where: str) -> tuple[Turns, frozenset[int]]:
    """Who said what, and which of it is not to be learnt."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: got {key} that is no list of messages; wanted objects with role and content")
    turns = tuple(_turn(message, f"{where}, {key} {number}") for number, message in enumerate(messages, start=1))
    weights = [message.get("weight", 1) for message in messages]
    for number, weight in enumerate(weights):
        if weight not in (0, 1) or (weight == 0 and turns[number][0] != "assistant"):
            raise DataError(
                f"{where}, {key} {number + 1}: got weight {weight!r:.20}; wanted 0 or 1, of the assistant's"
            )
    return turns, frozenset(number for number, weight in enumerate(weights) if weight == 0)


def _turn(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: got no object; wanted one with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise DataError(f"{where}: got role {role!r:.40}; wanted one of {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise DataError(f"{where}: got {key}; this server has no tools; leave it out")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str) or (role == "assistant" and not content):
        raise DataError(f"{where}: got content that is no text; wanted some")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: got half a surrogate pair in content; wanted Unicode; write both halves") from None
    return role, content


def _joined(parts: Sequence[Any], where: str) -> str:
    found = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(parts):
        raise DataError(f"{where}: got parts of content that are no text; wanted text alone")
    return "".join(texts)
