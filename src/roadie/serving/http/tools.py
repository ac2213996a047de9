"""Calls of tools in what a model says: how families of models write them, read as the text comes, and forced where wanted.

    hermes    <tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>    also Qwen's, and SmolLM2's
    llama3    {"name": "f", "parameters": {}}; {...}                       <|python_tag|> may stand before it
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {}}, {...}]

Which one a model writes is told by its chat template (`style_of`). What is no call of a tool that was offered is text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roadie.serving.grammars import JSON_OPTIONS, Constraint, Kind, closed, quoted

MAX_CALLS = 16
"""Of one answer that must call tools; a weak model would not come to an end by itself."""
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_OTHER_STYLES = ("[ARGS]", "<function=", "<arg_key>")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class Style:
    """How calls are written. opener: what the first begins with; is_bare: a whole answer that begins with { is one, too.

    marks: what stands around calls, beside white space. frame: what stands before the first, between two, and after the last.
    """

    opener: str
    marks: tuple[str, ...]
    frame: tuple[str, str, str]
    arguments: str = "arguments"
    is_bare: bool = False
    has_short_ids: bool = False

    def new_id(self) -> str:
        """For a call; templates of Mistral's take ids of nine letters and digits alone."""
        return uuid.uuid4().hex[:9] if self.has_short_ids else f"call_{uuid.uuid4().hex[:24]}"


_LISTED = ("[", "]", ",")
STYLES: Mapping[str, Style] = {
    "hermes": Style(
        "<tool_call>",
        ("<tool_call>", "</tool_call>", *_LISTED),
        ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    ),
    "llama3": Style("<|python_tag|>", ("<|python_tag|>", ";", ","), ("", "; ", ""), "parameters", is_bare=True),
    "mistral": Style("[TOOL_CALLS]", ("[TOOL_CALLS]", *_LISTED), ("[TOOL_CALLS][", ", ", "]"), has_short_ids=True),
}


def style_of(template: str) -> str | None:
    """The style of a chat template; None where it knows no tools, or writes them in another way."""
    if not knows_tools(template) or any(mark in template for mark in _OTHER_STYLES):
        return None
    told = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "ipython"}
    return next((name for name, mark in told.items() if mark in template), None)


def knows_tools(template: str) -> bool:
    """Whether tools are shown to the model at all."""
    return re.search(r"\btools\b", template) is not None


def takes_one_call(template: str) -> bool:
    """Whether a turn of a conversation may have one call alone, as of Llama 3."""
    return re.search(r"tool_calls\s*\|\s*length\s*==\s*1", template) is not None


@dataclass(frozen=True)
class Offer:
    """The tools of a request: schemas of parameters by name. is_forced: one is called in any case. most: of calls."""

    style: Style
    parameters: Mapping[str, Mapping[str, Any] | None]
    is_forced: bool = False
    most: int | None = None

    def constraint(self, special: Mapping[str, int], answer: Mapping[str, Any] | None = None) -> Constraint:
        """An answer of calls alone, or JSON by the schema `answer`. special: ids of the marks that are special tokens."""
        before, between, after = (_marked(text, special) for text in self.style.frame)
        more = f"({between} call){{0,{MAX_CALLS - 1}}}" if self.most != 1 else ""
        calls, lines = [], []
        for place, (name, schema) in enumerate(self.parameters.items()):
            # in the words that JSON is made of, so that where calls are bare an answer may begin as they do
            parts = ("{", '"name"', ": ", json.dumps(name), ", ", f'"{self.style.arguments}"', ": ")
            head = " ".join(map(quoted, parts))
            calls.append(f"call_{place}")
            lines += [f'call_{place}: {head} parameters_{place} "}}"', f"parameters_{place}: %json {_as_text(schema)}"]
        start = "start: calls" if answer is None else f"start: calls | answer\nanswer: %json {_as_text(answer)}"
        lines = [start, f"calls: {before} call {more} {after}", f"call: {' | '.join(calls)}", *lines]
        return Constraint(Kind.LARK, "\n".join(lines))


def _marked(text: str, special: Mapping[str, int]) -> str:
    """A text in a grammar; special tokens in it by their ids."""
    parts = re.split("|".join(f"({re.escape(mark)})" for mark in special), text) if special else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else quoted(part) for part in parts if part)


def _as_text(schema: Mapping[str, Any] | None) -> str:
    return json.dumps({**closed(dict(schema or _NO_PARAMETERS)), "x-guidance": JSON_OPTIONS})


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text, or, of call number `call`, text of its arguments; name: with the first of a call."""

    text: str
    call: int | None = None
    name: str | None = None


@dataclass
class _Object:
    """A JSON object as it comes. inner_end: where the first object in it ends; end: where it does itself."""

    text: str = ""
    name: str | None = None
    num_told: int = 0
    inner_end: int | None = None
    end: int | None = None
    _depth: int = 0
    _is_text: bool = False
    _is_escaped: bool = False

    def add(self, new: str) -> str:
        """Take what is part of it; what is not."""
        for place, letter in enumerate(new, len(self.text)):
            if self._is_text:
                self._is_text = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter == '"':
                self._is_text = True
            elif letter in "{}":
                self._turn(letter, place + 1)
            if self.end is not None:
                break
        taken = len(new) if self.end is None else self.end - len(self.text)
        self.text += new[:taken]
        return new[taken:]

    def _turn(self, letter: str, after: int) -> None:
        self._depth += 1 if letter == "{" else -1
        if letter == "}" and self._depth == 1 and self.inner_end is None:
            self.inner_end = after
        if self._depth == 0:
            self.end = after


@dataclass
class CallReader:
    """One answer as it comes, taken apart into text and calls."""

    offer: Offer
    num_calls: int = 0
    _held: str = ""
    _lead: str = ""  # what stood before an object that may be no call
    _is_in_calls: bool = False
    _has_text: bool = False
    _object: _Object | None = None
    _glue: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self._glue = re.compile(rf"(?:\s|{'|'.join(map(re.escape, self.offer.style.marks))})*")

    def push(self, text: str) -> list[Said]:
        """What is known now that more came."""
        self._held += text
        found: list[Said] = []
        while (step := self._step()) is not None:
            found += [said for said in step if said.text or said.name]
        return found

    def end(self) -> list[Said]:
        """What was held back, and is no call after all."""
        pending, self._object = self._object, None
        if pending is not None and pending.name is None:
            return [Said(self._lead + pending.text)]
        rest = self._lead + self._held if self._is_in_calls and not self.num_calls else self._held
        return [Said(rest)] if rest and not (pending or (self._is_in_calls and self.num_calls)) else []

    def _step(self) -> list[Said] | None:
        """Some way on; None where more has to come first."""
        if self._object is not None:
            return self._within(self._object)
        return self._between() if self._is_in_calls else self._text()

    def _text(self) -> list[Said] | None:
        opener, held = self.offer.style.opener, self._held
        if self.offer.style.is_bare and not self._has_text and held.lstrip().startswith("{"):
            self._is_in_calls, self._lead, self._held = True, "", held.lstrip()
            return []
        place = held.find(opener)
        if place >= 0:
            self._is_in_calls, self._lead, self._held = True, opener, held[place + len(opener) :]
            return self._told(held[:place].rstrip())
        sure = len(held) - _num_begun(held, (opener,))
        text = held[:sure].rstrip()
        if not text:
            return None
        self._held = held[len(text) :]
        return self._told(text)

    def _told(self, text: str) -> list[Said]:
        self._has_text = self._has_text or bool(text)
        return [Said(text)]

    def _between(self) -> list[Said] | None:
        glue = self._glue.match(self._held)
        assert glue is not None
        rest = self._held[glue.end() :]
        if not rest or any(mark.startswith(rest) for mark in self.offer.style.marks):
            return None
        self._lead += glue[0]
        self._held = rest
        if rest[0] == "{":
            self._object = _Object()
        else:
            self._is_in_calls = False
            self._held = rest if self.num_calls else self._lead + rest
            return self._told(self._taken())
        return []

    def _taken(self) -> str:
        text, self._held = self._held, ""
        return text

    def _within(self, found: _Object) -> list[Said] | None:
        self._held = found.add(self._held)
        said = self._begun(found)
        if found.end is not None:
            self._object = None
            return [*said, *([] if found.name is not None else self._whole(found))]
        return said or None

    def _begun(self, found: _Object) -> list[Said]:
        """Of an object with its name first: its arguments, as far as they are there."""
        head = _HEAD.match(found.text) if found.name is None else None
        if head is not None and head[1] in self.offer.parameters:
            found.name, found.num_told = head[1], head.end()
            return [*self._call(head[1]), *self._begun(found)]
        if found.name is None:
            return []
        end = len(found.text) if found.inner_end is None else found.inner_end
        begin, found.num_told = found.num_told, max(found.num_told, end)
        return self._arguments(found.text[begin:end])

    def _whole(self, found: _Object) -> list[Said]:
        """An object of another order, or one that is no call."""
        try:
            parsed = json.loads(found.text)
            keys = [key for key in ("arguments", "parameters") if key in parsed]
            name, arguments = parsed["name"], parsed[keys[0]] if keys else {}
            if not keys and self.offer.style.is_bare:  # an answer in JSON that has a name
                name = None
        except (ValueError, KeyError, RecursionError):
            name = None
        if not isinstance(name, str) or name not in self.offer.parameters:
            self._is_in_calls = False
            return self._told(self._lead + found.text)
        return [*self._call(name), *self._arguments(arguments if isinstance(arguments, str) else json.dumps(arguments))]

    def _call(self, name: str) -> list[Said]:
        self.num_calls, self._lead = self.num_calls + 1, ""
        return [Said("", self.num_calls - 1, name)] if self._is_wanted else []

    def _arguments(self, text: str) -> list[Said]:
        return [Said(text, self.num_calls - 1)] if text and self._is_wanted else []

    @property
    def _is_wanted(self) -> bool:
        """Whether the call that is read is not one too many."""
        return self.offer.most is None or self.num_calls <= self.offer.most


def _num_begun(text: str, marks: Sequence[str]) -> int:
    """How long the longest end of a text is that a mark begins with."""
    longest = max(map(len, marks)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in marks)), 0)


def specials(style: Style, special: Mapping[str, int]) -> dict[str, int]:
    """The marks of a style among a tokenizer's special tokens."""
    return {mark: special[mark] for mark in style.marks if mark in special}
