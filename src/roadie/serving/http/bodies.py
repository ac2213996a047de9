"""What callers send: OpenAI's requests, the fields that vLLM added to them, and `adapters`.

Unknown fields are refused, unless they are null, and those of messages left alone: clients send back what they were given.
`fields` has the kinds of values, and those of things that this server lacks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, Tag

from roadie.bank.blends import MAX_BLEND, MAX_STRENGTH
from roadie.serving.engine import (
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    Sampling,
    Scoring,
    Unload,
)
from roadie.serving.http.failures import ApiError, lacking
from roadie.serving.http.fields import (
    LIST,
    TEXT,
    Body,
    Label,
    Lacks,
    Off,
    Said,
    StreamOptions,
    Text,
    TextAlone,
    is_list,
    is_text,
    one_of,
    refusal_as_text,
    whole_characters,
)
from roadie.serving.http.formats import Formats
from roadie.serving.http.settings import MAX_CHOICES
from roadie.serving.http.tool_bodies import AllowedChoice, NamedTool, Tool, ToolCall, ToolChoice
from roadie.serving.places import MAX_NAME_CHARS, name_problem

_MARKS = Lacks("marks of messages to continue, but continue_final_message")
_SOUND, _FUNCTIONS = Lacks("sound"), Lacks("functions, but tools")
INT64 = 2**63
MAX_TOKEN_ID = 2**31 - 1


def served_name(name: str) -> str:
    """A name that an adapter of a server can have."""
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(f"got a name that no adapter can have: {problem}")
    return name


TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Strength: TypeAlias = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(served_name)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(whole_characters)]
Stops: TypeAlias = Annotated[
    Annotated[Stop | Literal[""], TEXT] | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS), LIST],
    one_of("a text or a list of texts", text=is_text, list=is_list),
]


class GenerationBody(Formats):
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
    stop: Stops | None = None
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
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    """0 or -1: no limit. An extra of vLLM, as are those below."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    """Above 1: what the prompt and the answer have said is less likely; 1: nothing."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    """Before so many, neither an end token nor a stop string ends the text."""
    skip_special_tokens: bool | None = None
    """False: special tokens are part of the text."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its own around the prompt: without it, it does for plain text, and not for chat templates."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many of the most likely tokens to report beside each token of the prompt. Not in streams."""

    return_token_ids: bool | None = None
    """Beside texts their tokens, and those of the prompt."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if not self.stop else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether each event of a stream has the usage so far."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling(
        self, max_tokens: int, logprobs: int | None, choice: int, extra_stop: tuple[str, ...] = ()
    ) -> Sampling:
        """How the engine is to draw choice number `choice`. Raises `ApiError`."""
        if (self.min_tokens or 0) > max_tokens:
            message = f"got min_tokens={self.min_tokens}; wanted at most max_tokens, which is {max_tokens}"
            raise ApiError(400, message, "invalid_value", param="min_tokens")
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
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            min_tokens=self.min_tokens or 0,
            skip_special_tokens=self.skip_special_tokens is not False,
            logit_bias={int(token): float(bias) for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )

    def check_streaming(self) -> None:
        """Raise `ApiError` for options of a stream where there is none, and for what no stream has."""
        if self.prompt_logprobs is not None and self.stream:
            message = "got prompt_logprobs in a stream; wanted stream=false, or echo with logprobs"
            raise ApiError(400, message, "invalid_value", param="prompt_logprobs")
        if self.wants_usage and not self.stream:
            raise ApiError(
                400, "got stream_options without stream; wanted stream=true", "invalid_value", param="stream_options"
            )


def _is_tokens(value: Any) -> bool:
    return is_list(value) and bool(value) and isinstance(value[0], int)


Tokens: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]
Prompt: TypeAlias = Annotated[
    Annotated[Text, TEXT] | Annotated[Tokens, LIST],
    one_of("a text or a list of token ids", text=is_text, list=is_list),
]
Prompts: TypeAlias = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES)]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[Text, TEXT] | Annotated[Tokens, Tag("(tokens)")] | Annotated[Prompts, LIST],
        one_of("a text, a list of token ids, or a list of either", text=is_text, tokens=_is_tokens, list=is_list),
    ]
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    """16 where it is left out; 0 with echo or prompt_logprobs: the prompt alone."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many of the most likely tokens to report beside each chosen one."""
    echo: bool | None = None
    """The prompt before its completion; with logprobs, those of its tokens, too."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Only as many as n."""
    suffix: Literal[""] | None = None
    """Nothing but an empty one: text is not filled in."""

    @property
    def scoring(self) -> Scoring | None:
        """What of the prompt is to be scored."""
        tops = [top for top in (self.logprobs if self.echo else None, self.prompt_logprobs) if top is not None]
        if tops:
            return Scoring(top=max(tops))
        return Scoring(last=0) if self.max_tokens == 0 else None

    def check(self) -> None:
        """Raise `ApiError` for fields that do not go together."""
        self.check_streaming()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "got max_tokens=0; wanted 1 at least, or the prompt: echo=true, or prompt_logprobs"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, f"got best_of={self.best_of}; wanted n, or none", "invalid_value", param="best_of")


class TextPart(Said):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Said):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[Text, TEXT] | Annotated[list[Annotated[TextPart, BeforeValidator(refusal_as_text)]], LIST],
            one_of("a text or a list of parts", text=is_text, list=is_list),
        ]
        | None
    ) = None
    name: Annotated[Text, Field(max_length=64)] | None = None
    refusal: Text | None = None
    """What an assistant said instead of content."""
    tool_calls: list[ToolCall] | None = None
    """What an assistant called."""
    tool_call_id: Label | None = None
    """Of a tool: the call that content answers."""
    function_call: Annotated[None, _FUNCTIONS] = None
    audio: Annotated[None, _SOUND] = None
    prefix: Annotated[Off, _MARKS] = None
    """A beginning of the answer is continued by `continue_final_message`."""
    partial: Annotated[Off, _MARKS] = None

    @property
    def text(self) -> str:
        """Its parts, one after another."""
        if self.content is None:
            return self.refusal or ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    """What is left of the context where neither it nor max_completion_tokens is given."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `enable_thinking`."""
    add_generation_prompt: bool | None = None
    """False: the prompt ends with the last message. An extra of vLLM, as is the one below."""
    continue_final_message: bool | None = None
    """The answer goes on where the last message ends."""
    chat_template: Annotated[None, Lacks("chat templates of requests")] = None
    echo: Off = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    """For models whose chat template knows tools."""
    tool_choice: ToolChoice | None = None
    """None: the tools are left out. Auto: the model calls some, or says something. Required, or a name: it calls, validly."""
    parallel_tool_calls: bool | None = None
    """False: one call at most."""
    functions: Annotated[list[dict[str, Any]] | None, _FUNCTIONS] = None
    """There are none, as there is nothing of what the fields below are about."""
    function_call: Annotated[Literal["none", "auto"] | None, _FUNCTIONS] = None
    modalities: Annotated[TextAlone, Lacks("outputs but text")] = None
    audio: Annotated[None, _SOUND] = None
    prediction: Annotated[None, Lacks("predictions")] = None
    verbosity: Annotated[Literal["medium"] | None, Lacks("levels of verbosity")] = None
    web_search_options: Annotated[None, Lacks("search of the web")] = None

    @property
    def most_tokens(self) -> int | None:
        """The newer name of max_tokens goes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def scoring(self) -> Scoring | None:
        """What of the prompt is to be scored."""
        return None if self.prompt_logprobs is None else Scoring(top=self.prompt_logprobs)

    def check(self) -> None:
        """Raise `ApiError` for fields that do not go together."""
        self.check_streaming()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "got top_logprobs; wanted logprobs=true with it", "invalid_value", param="top_logprobs")
        if self.functions and self.function_call != "none":
            raise lacking("functions", "functions, but tools")
        self._check_tools()
        self._check_contents()
        if self.continue_final_message and self.add_generation_prompt:
            message = (
                "got add_generation_prompt and continue_final_message; wanted one of them: an answer begins, or goes on"
            )
            raise ApiError(400, message, "invalid_value", param="add_generation_prompt")
        if self.continue_final_message and not self.messages[-1].text.strip():
            message = "got continue_final_message and a last message without text; wanted some text to continue"
            raise ApiError(400, message, "invalid_value", param="messages")

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        tools, names = [] if self.tool_choice == "none" else self.tools or [], self._allowed
        return tools if names is None else [tool for tool in tools if tool.function.name in names]

    @property
    def must_call(self) -> bool:
        """Whether one of them is called in any case."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice
        return mode == "required" or isinstance(choice, NamedTool)

    @property
    def _allowed(self) -> list[str] | None:
        choice = self.tool_choice
        return (
            [each.function.name for each in choice.allowed_tools.tools] if isinstance(choice, AllowedChoice) else None
        )

    @property
    def named_tool(self) -> str | None:
        """The one that is to be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def _check_contents(self) -> None:
        for place, message in enumerate(self.messages):
            if "content" not in message.model_fields_set and not message.tool_calls and not message.refusal:
                param = f"messages.{place}.content"
                raise ApiError(400, f"{param}: Field required", "missing_parameter", param=param)

    def _check_tools(self) -> None:
        names = [] if self.tool_choice == "none" else [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ApiError(400, "got two tools of one name; wanted each once", "invalid_value", param="tools")
        chosen = self._allowed or ([] if self.named_tool is None else [self.named_tool])
        strange = next((name for name in chosen if names and name not in names), None)
        if strange is not None:
            message = f"got {strange[:64]!r}, which is none of the tools; wanted one of them"
            raise ApiError(400, message, "invalid_value", param="tool_choice")


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: Annotated[Text, Field(max_length=4096)] | None = None
    """The base model where it is left out; an adapter may have a chat template of its own."""
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    """A text for each token, too."""

    @property
    def chat(self) -> ChatBody | None:
        """The conversation. Raises `ApiError` where there is not one of prompt and messages."""
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "got not one of prompt and messages; wanted one", "missing_parameter", param="prompt")
        if self.messages is None:
            return None
        shared = set(ChatBody.model_fields) & set(TokenizeBody.model_fields) - {"model"}
        return ChatBody(model=self.model or "base", **{name: getattr(self, name) for name in shared})


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Annotated[Text, Field(max_length=4096)] | None = None
    tokens: list[TokenId]


Path: TypeAlias = Annotated[Text, Field(min_length=1, max_length=4096)]


class LoadLoraBody(Body):
    """`POST /v1/load_lora_adapter`, as vLLM has it."""

    lora_name: Name
    lora_path: Path
    """A folder within those that adapters may be loaded from; relative paths are within the folder of adapters."""
    load_inplace: bool | None = None
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
    replace: bool | None = None


class UnloadBody(Body):
    """`POST /v1/adapters/unload`."""

    name: Name
    how: Annotated[Unload, Field(strict=False)] = Unload.WAIT
    """wait: serve its requests first; refuse: 409 where there are any; cancel: cancel them."""


class PinBody(Body):
    """`POST /v1/adapters/pin`."""

    name: Name
    pinned: bool = True
