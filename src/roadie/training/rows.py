"""Rows of data sets: the forms that are known, and the frozen value that each of them becomes.

    Text         {"text": ...}                                        every token is learnt
    Completion   {"prompt": ..., "completion": ...}                   the completion is learnt
    Chat         {"messages": [{"role": ..., "content": ...}, ...]}   the assistant's turns are learnt
                 {"conversations": [{"from": ..., "value": ...}, ...]}   the same in ShareGPT's words
    Instruction  {"instruction": ..., "input": ..., "output": ...}    Alpaca's: the output is learnt; input may be absent
    Preference   {"prompt": ..., "chosen": ..., "rejected": ...}      texts, or lists of messages; for preference training

A row is of the first form all of whose keys it has (a null counts as none); its other keys are ignored, but for those that
change what is said: "system" and "history", as some data sets have them beside the last two of the supervised forms.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roadie.errors import RoadieError

Turns = tuple[tuple[str, str], ...]


class DataError(RoadieError, ValueError):
    """A training text is missing, unreadable, or not in one of the documented forms."""


@dataclass(frozen=True)
class Text:
    """A text to be learnt whole; `packed` texts are joined and cut into blocks instead of being one example each."""

    text: str
    where: str
    packed: bool = False


@dataclass(frozen=True)
class Completion:
    """A prompt, and the completion to be learnt."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation of (role, content) turns, in which the assistant's turns are learnt, but for those at `left_out`."""

    turns: Turns
    where: str
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Instruction:
    """A task, what it is done to (maybe ""), and the output to be learnt; written as the model's tokenizer asks for."""

    instruction: str
    given: str
    output: str
    where: str

    @property
    def as_chat(self) -> Chat:
        """The task as the user's turn and the output as the assistant's."""
        task = f"{self.instruction}\n\n{self.given}" if self.given else self.instruction
        return Chat((("user", task), ("assistant", self.output)), self.where)

    @property
    def as_completion(self) -> Completion:
        """The task under Alpaca's headings, for models without a chat template."""
        given = f"### Input:\n{self.given}\n\n" if self.given else ""
        return Completion(f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n", self.output, self.where)


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it, of which the first is to be preferred: all texts, or all turns."""

    prompt: str | Turns
    chosen: str | Turns
    rejected: str | Turns
    where: str


Record = Text | Completion | Chat | Instruction | Preference


def parse_record(value: object, where: str, *, preferences: bool = False) -> Record:
    """The record a JSON object stands for; `where` names its place in messages. Raises `DataError`.

    preferences: a row that is a preference and something else too, as some data sets have it, is taken for a preference.
    """
    if not isinstance(value, Mapping):
        raise DataError(
            f'{where}: got a JSON {type(value).__name__}; wanted one object a line, such as {{"text": ...}}'
        )
    return _FORMS[_form(value, where, preferences)](value, where)


def _form(row: Mapping[str, Any], where: str, preferences: bool) -> tuple[str, ...]:
    """The keys of the form of a row: all of them there, or else most (the reader then says what is missing)."""
    order = sorted(_FORMS, key=lambda keys: ("chosen" in keys) != preferences)
    whole = [keys for keys in order if all(row.get(key) is not None for key in keys)]
    if whole:
        return whole[0]
    begun = [keys for keys in order if any(key in row for key in keys)]
    if begun:
        return max(begun, key=lambda keys: (sum(key in row for key in keys), "chosen" in keys))
    raise DataError(f"{where}: got keys {sorted(map(str, row))} without 'text'; wanted {KNOWN_FORMS}")


def _text(row: Mapping[str, Any], where: str) -> Text:
    return Text(_string(row, "text", where), where)


def _completion(row: Mapping[str, Any], where: str) -> Completion:
    prompt = _string(row, "prompt", where, may_be_empty=True)
    return Completion(prompt, _string(row, "completion", where), where)


def _instruction(row: Mapping[str, Any], where: str) -> Record:
    _none_of(row, ("system", "history"), where)
    given = "" if row.get("input") is None else _string(row, "input", where, may_be_empty=True)
    return Instruction(_string(row, "instruction", where), given, _string(row, "output", where), where)


def _messages(row: Mapping[str, Any], where: str) -> Chat:
    return _chat(_turns(row["messages"], "messages", where), where)


def _conversations(row: Mapping[str, Any], where: str) -> Chat:
    turns = _turns(row["conversations"], "conversations", where)
    if row.get("system") and turns[0][0] != "system":
        turns = (("system", _string(row, "system", where)), *turns)
    return _chat(turns, where)


def _chat(turns: Turns, where: str) -> Chat:
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{where}: got no message of the assistant; wanted one at least, since only those are learnt")
    return Chat(turns, where)


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    if isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), str):
        prompt = _string(row, "prompt", where, may_be_empty=True)
        return Preference(prompt, _string(row, "chosen", where), _string(row, "rejected", where), where)
    for key in ("chosen", "rejected"):
        if key not in row:
            _string(row, key, where)
    chosen, rejected = (_turns(row[key], key, where) for key in ("chosen", "rejected"))
    shared = 0 if chosen[0][0] == "assistant" else _shared_turns(chosen, rejected)
    turns = chosen[:shared] or _prompt_turns(row, where)
    answers = chosen[shared:], rejected[shared:]
    if not turns or any(answer[0][0] != "assistant" for answer in answers):
        raise DataError(
            f"{where}: got chosen and rejected that part at message {shared + 1}; wanted two answers of the assistant to "
            'the same messages: under "prompt", or at the beginning of both'
        )
    return Preference(turns, *answers, where)


def _shared_turns(chosen: Turns, rejected: Turns) -> int:
    """How many turns both begin with; an answer is left to each."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return next(
        (number for number, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)) - 1
    )


def _prompt_turns(row: Mapping[str, Any], where: str) -> Turns:
    if isinstance(row.get("prompt"), str):
        return (("user", _string(row, "prompt", where)),)
    if "prompt" not in row:
        return ()
    return _turns(row["prompt"], "prompt", where)


_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Record]] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
    ("text",): _text,
    ("chosen", "rejected"): _preference,
}
KNOWN_FORMS = (
    '"text"; or "prompt" and "completion"; or "messages"; or "conversations" (ShareGPT); or "instruction", "input" and '
    '"output" (Alpaca); or "prompt", "chosen" and "rejected" (preferences)'
)


def _none_of(row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Raise where a key says something that the form has no place for."""
    for key in keys:
        if row.get(key):
            raise DataError(
                f'{where}: got {key}={row[key]!r} beside "instruction"; wanted none, since it would be left out in silence; '
                'write the row as "messages"'
            )


def _string(row: Mapping[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    if key not in row:
        raise DataError(f"{where}: got keys {sorted(map(str, row))} without {key!r}; wanted {KNOWN_FORMS}")
    text = row[key]
    if not isinstance(text, str) or not (text or may_be_empty):
        raise DataError(f"{where}: got {key}={text!r}; wanted a string{'' if may_be_empty else ' that is not empty'}")
    return _valid_unicode(text, key, where)


def _valid_unicode(text: str, key: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: got {text[error.start]!r} in {key}, half of a surrogate pair; wanted Unicode; write both halves"
        ) from None
    return text


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
"""Whom ShareGPT's "from" names, by the roles of chat templates."""


def _turns(messages: object, key: str, where: str) -> Turns:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f'{where}: got {key}={messages!r}; wanted a list of objects with "role" and "content", or "from" and "value"'
        )
    return tuple(_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1))


def _turn(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f'{where}: got {message!r}; wanted an object with "role" and "content"')
    shared = "from" in message and "role" not in message
    role, content = ("from", "value") if shared else ("role", "content")
    for key in (role, content):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: got {key}={message.get(key)!r}; wanted a string")
    speaker: str = message[role]
    if shared:
        if speaker not in _SPEAKERS:
            raise DataError(f"{where}: got from={speaker!r}; wanted one of {', '.join(_SPEAKERS)}; rename it")
        speaker = _SPEAKERS[speaker]
    return speaker, _valid_unicode(message[content], content, where)
