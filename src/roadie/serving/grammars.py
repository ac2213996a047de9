"""What an answer must be: JSON of a schema, a text of a regular expression, one of some texts, or whatever a grammar describes.

    Constraint(Kind.JSON, '{"type": "object"}')  --Grammars.compile-->  Grammar  --Progress-->  of one answer

llguidance (imported where it is first needed) makes a parser of it, which says after each token which may follow. Constraints
come from callers: their length is limited here, and what compiling and a step may cost is limited there (`_limits`); whatever
does not keep within it is an error that says so. Why llguidance, and what it costs a token: docs/decisions/0034.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from roadie.errors import ConfigError
from roadie.extras import need

MAX_CHARS = 1 << 16
"""Of one constraint: the longest takes about a second to compile."""
MAX_KEPT, MAX_KEPT_CHARS = 64, 1 << 20
"""Grammars, and characters of their constraints: at `_limits`, what is kept takes some 500 MiB at most."""
_BY_NAME, _LISTS = {"properties", "$defs", "definitions"}, {"anyOf", "oneOf", "prefixItems"}
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
JSON_OPTIONS = {"coerce_one_of": True, "whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON comes in one line: a model that may begin lines can go on for ever, and each of its spaces takes a forward."""


class Kind(str, Enum):
    """What a constraint is written in."""

    JSON = "json"  # a JSON schema
    REGEX = "regex"  # a regular expression, which the whole answer matches
    LARK = "lark"  # a grammar, as llguidance writes it


@dataclass(frozen=True)
class Constraint:
    """What an answer must be."""

    kind: Kind
    source: str


def one_of(texts: Sequence[str]) -> Constraint:
    """The answer is one of these texts."""
    return Constraint(Kind.LARK, "start: " + " | ".join(map(quoted, texts)))


def quoted(text: str) -> str:
    """A text as a grammar has it."""
    return json.dumps(text)


def closed(schema: Any) -> Any:
    """A JSON schema whose objects have the properties that it names and, where it does not speak of others, no others.

    A model that may add some goes on adding. A schema with an `allOf`, whose parts would exclude each other, stays as it is.
    """
    return schema if '"allOf"' in json.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            found[key] = {name: _closed(part) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            found[key] = [_closed(part) for part in value]
        elif key == "items":
            found[key] = _closed(value)
    if "properties" in schema and not _OPEN & schema.keys():
        found["additionalProperties"] = False
    return found


def is_installed() -> bool:
    """Whether there is what compiles constraints."""
    return find_spec("llguidance") is not None


class Progress:
    """How far one answer has come. failure: why it cannot go on within the limits; None where it can."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar, self._matcher = grammar, grammar.matcher.deep_copy()
        self.failure: ConfigError | None = None

    def allowed(self) -> Tensor:
        """bool ``[V]``: the tokens that may follow."""
        mask = self._matcher.compute_logit_bias()
        self._look()
        return torch.frombuffer(bytearray(mask), dtype=torch.uint8) > 0

    def take(self, token_id: int) -> None:
        """The answer goes on by this token, which is an allowed one."""
        self._matcher.consume_token(token_id)
        self._look()

    @property
    def is_whole(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _look(self) -> None:
        if self._matcher.is_error():
            self._grammar.is_spent = True
            self.failure = ConfigError(f"got a constraint that an answer cannot be kept to: {_reason(self._matcher)}")


@dataclass(eq=False)
class Grammar:
    """A compiled constraint; any number of answers may be kept to it, which share what was found out about it.

    is_spent: what they share has come to its limit, so that the next answer needs it compiled anew.
    """

    matcher: Any
    is_spent: bool = False


class Grammars:
    """Compiles constraints for a tokenizer, and keeps those that were used last. All methods may be called from any thread.

    vocabulary_size: V, of the model's logits.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        self._tokenizer, self._vocabulary_size = tokenizer, vocabulary_size
        self._own: Any = None  # llguidance's tokenizer
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._compiling, self._changing = threading.Lock(), threading.Lock()

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint, at once where it is kept, else in up to two seconds.

        Raises `ConfigError` for a constraint that is too long, wrong, or too costly, or that nothing meets.
        """
        if len(constraint.source) > MAX_CHARS:
            raise ConfigError(f"got a constraint of {len(constraint.source)} characters; wanted at most {MAX_CHARS}")
        found = self._find(constraint)
        if found is None:
            with self._compiling:
                found = self._find(constraint) or self._compiled(constraint)
                self._keep(constraint, found)
        return found

    def begin(self, constraint: Constraint | None) -> Progress | None:
        """That of one answer; None where it may be anything. Raises what `compile` raises."""
        return None if constraint is None else Progress(self.compile(constraint))

    def _find(self, constraint: Constraint) -> Grammar | None:
        with self._changing:
            found = self._kept.get(constraint)
            if found is None or found.is_spent:
                return None
            self._kept.move_to_end(constraint)
            return found

    def _keep(self, constraint: Constraint, grammar: Grammar) -> None:
        with self._changing:
            self._kept[constraint] = grammar
            while len(self._kept) > MAX_KEPT or sum(len(kept.source) for kept in self._kept) > MAX_KEPT_CHARS:
                self._kept.popitem(last=False)

    def _compiled(self, constraint: Constraint) -> Grammar:
        need("serve", "llguidance")
        import llguidance

        if self._own is None:
            self._own = self._tokenizer_of(llguidance)
        source = _source(constraint, llguidance)
        matcher = llguidance.LLMatcher(self._own, source, log_level=0, limits=_limits(llguidance))
        if matcher.is_error():
            raise _unusable(_reason(matcher))
        if matcher.is_stopped():
            raise _unusable("nothing but an empty answer meets it")
        return Grammar(matcher)

    def _tokenizer_of(self, llguidance: Any) -> Any:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                "got a constraint for a model without a fast tokenizer (tokenizer.json); wanted one with it"
            )
        description = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        try:
            return llguidance.LLTokenizer(json.dumps(description), self._vocabulary_size, self._tokenizer.eos_token_id)
        except ValueError as error:
            raise _unusable(f"the model's tokenizer takes none ({error})") from None


def _source(constraint: Constraint, llguidance: Any) -> str:
    """The constraint in llguidance's own words."""
    matcher = llguidance.LLMatcher
    if constraint.kind is Kind.REGEX:
        return str(matcher.grammar_from_regex(constraint.source))
    if constraint.kind is Kind.LARK:
        return str(matcher.grammar_from_lark(constraint.source))
    try:
        return str(matcher.grammar_from_json_schema(closed(json.loads(constraint.source)), overrides=JSON_OPTIONS))
    except (ValueError, RecursionError) as error:
        raise _unusable(str(error)) from None


def _limits(llguidance: Any) -> Any:
    """Of constraints made to be costly: measured on one core, a step takes 100 ms and a grammar grows by 7 MiB at most."""
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _reason(matcher: Any) -> str:
    return " ".join(str(matcher.get_error()).replace("<non-verbose/>", "").split()) or "no reason is known"


def _unusable(reason: str) -> ConfigError:
    return ConfigError(f"got a constraint that cannot be used: {reason}")
