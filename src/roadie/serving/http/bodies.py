"""What callers send: OpenAI's requests, the fields that vLLM added to them, and `adapters`. Unknown fields are refused.

Fields of OpenAI's that change nothing here are taken, and so are those of things that this server lacks, where they ask for
nothing (``"tools": []``): clients send them unasked. `failures` has the words for those that ask for something.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from roadie.serving.engine import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Sampling, Unload
from roadie.serving.http.failures import ApiError
from roadie.serving.http.settings import MAX_BLEND, MAX_CHOICES, MAX_STRENGTH

INT64 = 2**63
MAX_TOKEN_ID = 2**31 - 1


def _without_surrogates(text: str) -> str:
    """JSON can spell halves of characters, as in "\\ud800", which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("got half a surrogate pair; wanted whole characters") from None
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_without_surrogates)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Strength: TypeAlias = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
Stop: TypeAlias = Annotated[Text, Field(min_length=1, max_length=1000)]
NoItems: TypeAlias = Annotated[list[Any], Field(max_length=0)]
Label: TypeAlias = Annotated[Text, Field(max_length=1024)]


class Body(BaseModel):
    """A JSON object with these fields and no others, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Body):
    """How a stream is to be."""

    include_usage: bool = False
    """One more event before the end, without choices, with `usage`."""
    include_obfuscation: bool | None = None
    """Taken, and not used."""


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: Annotated[Text, Field(min_length=1, max_length=4096)]
    """The base model, an adapter, more or less of one (`legal=1.5`), or a blend (`base:legal=0.7+terse=0.3`)."""
    adapters: Annotated[dict[Name, Strength], Field(max_length=MAX_BLEND)] | None = None
    """Beside `model: "base"`: adapters and their weights, a blend; or one adapter and its strength. An extra of roadie."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most likely token. 1 where it is left out."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Choices for each prompt."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    """The same seed gives the same tokens; choice number i is drawn with seed + i."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    """Taken, and neither used nor logged, as are the five below: requests are counted by their key."""
    metadata: Annotated[dict[Label, Label], Field(max_length=64)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    """0 or -1: no limit. An extra of vLLM, as are the five below."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(
        self, max_tokens: int, logprobs: int | None, choice: int, extra_stop: tuple[str, ...] = ()
    ) -> Sampling:
        """How the engine is to draw choice number `choice`."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(0, self.top_k or 0),
            min_p=float(self.min_p or 0.0),
            seed=None if self.seed is None else (self.seed + choice + INT64) % (2 * INT64) - INT64,
            stop=(*self.stops, *extra_stop)[:MAX_STOP_STRINGS],
            include_stop=bool(self.include_stop_str_in_output),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=float(self.presence_penalty or 0.0),
            frequency_penalty=float(self.frequency_penalty or 0.0),
            logit_bias={int(token): float(bias) for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )

    def check_streaming(self) -> None:
        """Raise `ApiError` for options of a stream where there is none."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "got stream_options without stream; wanted stream=true", "invalid_value", param="stream_options"
            )


Prompt: TypeAlias = Text | Annotated[list[TokenId], Field(min_length=1)]
Prompts: TypeAlias = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES)]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[TokenId], Field(min_length=1)] | Prompts
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    """16 where it is left out."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many of the most likely tokens to report beside each chosen one."""
    echo: bool | None = None
    """The prompt before its completion. Not together with logprobs."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Only as many as n."""
    suffix: Literal[""] | None = None
    """Nothing but an empty one: text is not filled in."""

    def check(self) -> None:
        """Raise `ApiError` for fields that do not go together."""
        self.check_streaming()
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "got echo and logprobs; wanted one: a prompt has no logprobs here", "invalid_value", param="echo"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, f"got best_of={self.best_of}; wanted n, or none", "invalid_value", param="best_of")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a conversation; fields of OpenAI's answers are taken where they are null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None
    name: Annotated[Text, Field(max_length=64)] | None = None
    refusal: None = None
    tool_calls: NoItems | None = None
    function_call: None = None
    audio: None = None
    annotations: NoItems | None = None

    @property
    def text(self) -> str:
        """Its parts, one after another."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Text is the only one."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    """What is left of the context where neither it nor max_completion_tokens is given."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: NoItems | None = None
    """There are none, as there is nothing of what the fields below are about."""
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoItems | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def most_tokens(self) -> int | None:
        """The newer name of max_tokens goes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raise `ApiError` for fields that do not go together."""
        self.check_streaming()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "got top_logprobs; wanted logprobs=true with it", "invalid_value", param="top_logprobs")


Path: TypeAlias = Annotated[Text, Field(min_length=1, max_length=4096)]


class LoadLoraBody(Body):
    """`POST /v1/load_lora_adapter`, as vLLM has it."""

    lora_name: Name
    lora_path: Path
    """A folder within those that adapters may be loaded from; relative paths are within the folder of adapters."""
    load_inplace: bool = False
    """Replace a loaded adapter of that name."""


class UnloadLoraBody(Body):
    """`POST /v1/unload_lora_adapter`, as vLLM has it: requests that use the adapter are served first."""

    lora_name: Name
    lora_int_id: int | None = None
    """Taken, and not needed."""


class LoadBody(Body):
    """`POST /v1/adapters/load`."""

    name: Name
    path: Path | None = None
    """None: the folder of that name in the folder of adapters."""
    replace: bool = False


class UnloadBody(Body):
    """`POST /v1/adapters/unload`."""

    name: Name
    how: Annotated[Unload, Field(strict=False)] = Unload.WAIT
    """wait: serve its requests first; refuse: 409 where there are any; cancel: cancel them."""


class PinBody(Body):
    """`POST /v1/adapters/pin`."""

    name: Name
    pinned: bool = True
