"""What an answer is to be, as callers say it: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_...`.

{"type": "json_object"}                                        any JSON object
{"type": "json_schema", "json_schema": {"schema": {...}}}      JSON by a schema, strict or not
guided_json, guided_regex, guided_choice                       vLLM's older names
structured_outputs: {"json" | "regex" | "choice" | "json_object": ...}    its newer ones
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from roadie.serving.grammars import MAX_CHARS, Constraint, Kind, one_of
from roadie.serving.http.failures import ApiError
from roadie.serving.http.fields import LIST, TEXT, Body, Label, Lacks, Off, Text, Unasked, is_text
from roadie.serving.http.fields import one_of as one_of_kinds

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_SPACES, _GRAMMARS = (
    Lacks("patterns of white space"),
    Lacks("grammars of requests, but JSON schemas, regexes and choices"),
)
_FORMATS, _BACKENDS = Lacks("formats but text and JSON"), Lacks("choice of what guides decoding")

Schema: TypeAlias = Annotated[
    Annotated[Text, TEXT] | Annotated[dict[str, Any], LIST],
    one_of_kinds("a JSON schema, as an object or a text", text=is_text, list=lambda value: isinstance(value, dict)),
]
Regex: TypeAlias = Annotated[Text, Field(min_length=1, max_length=MAX_CHARS)]
Choices: TypeAlias = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=4096)]


class JsonSchema(Body):
    """A schema and its name. All of it is kept to, whether it is strict or not."""

    name: Label
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer is to be. Unlike OpenAI's, a prompt need not speak of JSON."""

    type: Annotated[Literal["text", "json_object", "json_schema"], _FORMATS]
    json_schema: JsonSchema | None = None

    def constraint(self) -> Constraint | None:
        """What an answer must be. Raises `ApiError`."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = f"got type {self.type!r}; wanted json_schema with type 'json_schema', and with it alone"
            raise ApiError(400, message, "invalid_value", param="response_format.json_schema")
        if self.type == "text":
            return None
        return json_by((self.json_schema and self.json_schema.schema_) or ANY_OBJECT)


class StructuredOutputs(Body):
    """One of these; vLLM's."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Regex | None = None
    choice: Choices | None = None
    json_object: bool | None = None
    grammar: Annotated[None, _GRAMMARS] = None
    structural_tag: Annotated[None, _FORMATS] = None
    whitespace_pattern: Annotated[None, _SPACES] = None
    disable_any_whitespace: Annotated[Off, _SPACES] = None
    disable_fallback: bool | None = None
    """Taken, and not used: there is nothing to fall back to."""
    disable_additional_properties: Annotated[Off, Lacks("changes of schemas")] = None


class Formats(Unasked):
    """The fields of a request that say what its answer is to be."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    """The whole answer matches it. No look-around, no references back."""
    guided_choice: Choices | None = None
    guided_grammar: Annotated[None, _GRAMMARS] = None
    guided_decoding_backend: Annotated[None, _BACKENDS] = None
    guided_whitespace_pattern: Annotated[None, _SPACES] = None
    structural_tag: Annotated[None, _FORMATS] = None

    def constraint(self) -> tuple[str, Constraint] | None:
        """What the answer must be, and the field that says so; None: anything. Raises `ApiError` for more than one."""
        new = self.structured_outputs or StructuredOutputs()
        found = {
            "response_format": self.response_format and self.response_format.constraint(),
            "guided_json": by_schema(self.guided_json),
            "guided_regex": self.guided_regex and Constraint(Kind.REGEX, self.guided_regex),
            "guided_choice": self.guided_choice and one_of(self.guided_choice),
            "structured_outputs.json": by_schema(new.json_),
            "structured_outputs.regex": new.regex and Constraint(Kind.REGEX, new.regex),
            "structured_outputs.choice": new.choice and one_of(new.choice),
            "structured_outputs.json_object": json_by(ANY_OBJECT) if new.json_object else None,
        }
        asked = [(name, constraint) for name, constraint in found.items() if isinstance(constraint, Constraint)]
        if len(asked) > 1:
            message = f"got {' and '.join(name for name, _ in asked)}; wanted one of them: an answer is kept to one"
            raise ApiError(400, message, "invalid_value", param=asked[1][0])
        return asked[0] if asked else None


def by_schema(schema: str | dict[str, Any] | None) -> Constraint | None:
    """JSON by a schema, which may be written as a text."""
    if isinstance(schema, str):
        return Constraint(Kind.JSON, schema)
    return None if schema is None else json_by(schema)


def json_by(schema: dict[str, Any]) -> Constraint:
    """JSON by a schema."""
    return Constraint(Kind.JSON, json.dumps(schema, separators=(",", ":")))
