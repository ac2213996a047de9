"""Kinds of values in what callers send, and the fields that clients send unasked.

A field of something that this server lacks is taken where its value asks for nothing: null, or what happens anyway (``"n": 1``,
``"use_beam_search": false``). Any other value is refused by the field's name (`Lacks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema


def whole_characters(text: str) -> str:
    """JSON can spell halves of characters, as in "\\ud800", which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("got half a surrogate pair; wanted whole characters") from None
    return text


def one_of(wanted: str, **tests: Callable[[Any], bool]) -> Discriminator:
    """Which of the kinds tagged ``(name)`` a value is, so that an error is of that kind alone. wanted: all of them, in words."""

    def kind(value: Any) -> str | None:
        return next((f"({name})" for name, is_kind in tests.items() if is_kind(value)), None)

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {wanted}")


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Whether a value is a list."""
    return isinstance(value, list)


def refusal_as_text(part: Any) -> Any:
    """A part of a message that is a refusal is text that the assistant said."""
    is_refusal = isinstance(part, dict) and part.get("type") == "refusal"
    return {"type": "text", "text": part.get("refusal")} if is_refusal else part


TEXT, LIST = Tag("(text)"), Tag("(list)")
Text: TypeAlias = Annotated[str, AfterValidator(whole_characters)]
Label: TypeAlias = Annotated[Text, Field(max_length=1024)]
NoItems: TypeAlias = Annotated[list[Any], Field(max_length=0)] | None
NoEntries: TypeAlias = Annotated[dict[str, Any], Field(max_length=0)] | None
TextAlone: TypeAlias = Annotated[list[Literal["text"]], Field(max_length=1)] | None
Off: TypeAlias = Literal[False] | None
Zero: TypeAlias = Annotated[int, Field(ge=0, le=0)] | None
One: TypeAlias = Annotated[float, Field(ge=1, le=1)] | None
LACKING = "lacking"


@dataclass(frozen=True)
class Lacks:
    """Marks a field of something that this server lacks, whose type is what asks for nothing; any other value says so."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), LACKING, custom_error_message=self.what)


class Body(BaseModel):
    """A JSON object with these fields, each of its own type, and no others, unless they are null."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, None] = Field(init=False)


class Said(BaseModel):
    """A part of what was said; other fields than these are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)


class StreamOptions(Body):
    """How a stream is to be."""

    include_usage: bool | None = None
    """One more event before the end, without choices, with `usage`."""
    include_obfuscation: bool | None = None
    """Taken, and not used."""
    continuous_usage_stats: bool | None = None
    """With include_usage: every event has the `usage` so far. An extra of vLLM."""


_BEAMS = Lacks("beam search")
_PROCESSORS, _TOKEN_IDS = Lacks("logits processors of requests"), Lacks("ids of tokens in answers")
_TOKEN_LISTS = Lacks("lists of tokens that may or may not come, but logit_bias")


class Unasked(Body):
    """Fields that ask for nothing here; the first eight are taken whatever they say, and neither used nor logged."""

    user: Label | None = None
    """Taken, and not used: requests are counted by their key."""
    metadata: Annotated[dict[Label, Label], Field(max_length=64)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: Label | None = None
    include_reasoning: bool | None = None
    """There is none to include."""
    moderation: Annotated[None, Lacks("moderation")] = None
    reasoning_effort: Annotated[Literal["none"] | None, Lacks("levels of reasoning")] = None
    use_beam_search: Annotated[Off, _BEAMS] = None
    early_stopping: Annotated[Off, _BEAMS] = None
    length_penalty: Annotated[One, _BEAMS] = None
    priority: Annotated[Zero, Lacks("priorities")] = None
    allowed_token_ids: Annotated[None, _TOKEN_LISTS] = None
    bad_words: Annotated[NoItems, _TOKEN_LISTS] = None
    cache_salt: Annotated[None, Lacks("salts of requests: adapters share no prefixes anyway")] = None
    documents: Annotated[NoItems, Lacks("documents beside messages")] = None
    kv_transfer_params: Annotated[None, Lacks("transfer of caches")] = None
    logits_processors: Annotated[NoItems, _PROCESSORS] = None
    mm_processor_kwargs: Annotated[NoEntries, Lacks("inputs but text")] = None
    return_tokens_as_token_ids: Annotated[Off, _TOKEN_IDS] = None
    spaces_between_special_tokens: Annotated[Literal[True] | None, Lacks("ways to leave out these spaces")] = None
    truncate_prompt_tokens: Annotated[None, Lacks("truncation of prompts")] = None
    vllm_xargs: Annotated[NoEntries, _PROCESSORS] = None
