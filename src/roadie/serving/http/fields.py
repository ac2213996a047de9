"""Kinds of values in what callers send, and the fields that clients send unasked.

A field of something that this server lacks is taken where its value asks for nothing: null, or what happens anyway (``"n": 1``,
``"use_beam_search": false``). Any other value is refused by the field's name; `failures` has the words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


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


TEXT, LIST = Tag("(text)"), Tag("(list)")
Text: TypeAlias = Annotated[str, AfterValidator(whole_characters)]
Label: TypeAlias = Annotated[Text, Field(max_length=1024)]
NoItems: TypeAlias = Annotated[list[Any], Field(max_length=0)]
NoEntries: TypeAlias = Annotated[dict[str, Any], Field(max_length=0)]
Off: TypeAlias = Literal[False] | None
Zero: TypeAlias = Annotated[int, Field(ge=0, le=0)] | None
One: TypeAlias = Annotated[float, Field(ge=1, le=1)] | None


class Body(BaseModel):
    """A JSON object with these fields, each of its own type, and no others, unless they are null."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, None] = Field(init=False)


class Unasked(Body):
    """Fields that ask for nothing here; the first seven are taken whatever they say, and neither used nor logged."""

    user: Label | None = None
    """Taken, and not used: requests are counted by their key."""
    metadata: Annotated[dict[Label, Label], Field(max_length=64)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    include_reasoning: bool | None = None
    """There is none to include."""
    reasoning_effort: Literal["none"] | None = None
    use_beam_search: Off = None
    early_stopping: Off = None
    length_penalty: One = None
    priority: Zero = None
    allowed_token_ids: None = None
    bad_words: NoItems | None = None
    cache_salt: None = None
    documents: NoItems | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_decoding_backend: None = None
    guided_whitespace_pattern: None = None
    kv_transfer_params: None = None
    logits_processors: NoItems | None = None
    mm_processor_kwargs: NoEntries | None = None
    prompt_logprobs: None = None
    response_format: PlainText | None = None
    return_token_ids: Off = None
    return_tokens_as_token_ids: Off = None
    spaces_between_special_tokens: Literal[True] | None = None
    structural_tag: None = None
    structured_outputs: None = None
    truncate_prompt_tokens: None = None
    vllm_xargs: NoEntries | None = None


class PlainText(Body):
    """Text is the only format."""

    type: Literal["text"]


Unasked.model_rebuild()
