"""What callers get: OpenAI's answers. The routes send plain dictionaries, which tests compare with these models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from roadie.serving.http.extensions import RunFigures


class Answer(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetails(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """Every answer of a status of 400 and more."""

    error: ErrorDetails


class CachedTokens(Answer):
    """Of the prompt: those that another request had computed."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request; those of a prompt count once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(Answer):
    """A value a token; with `echo`, of the prompt's first: null, since nothing precedes the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(Answer):
    """A token, at a place of a prompt; rank: 1 for the most likely."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Answer):
    """One continuation of one prompt; index: n choices of the first prompt, then those of the second."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    """Where they were asked for: by id, at each token of the prompt but the first, itself and the likeliest."""
    token_ids: list[int] | None = None
    """Where they were asked for, as those of the prompt, which a stream has once for each choice."""
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """Also each event of a stream: finish_reason is null until the last, usage null but where it is asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(Answer):
    """A token that might have been chosen. bytes: its own, which may be a part of a character; token shows these as \\xe2."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """A value a token."""

    content: list[TokenLogprob]


class CalledFunction(Answer):
    """A tool's name, and its arguments as a text of JSON; in a stream the name comes first, and the arguments piece by piece."""

    name: str | None = None
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Answer):
    """What the model said, and which tools it calls; content: null where it calls some and says nothing."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One answer to the conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | None = None
    """Where they were asked for."""


class Chat(Answer):
    """`POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    """As completions have them."""
    prompt_token_ids: list[int] | None = None


class ToolCallPart(Answer):
    """What is new of a call; id and type: with its first part."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Delta(Answer):
    """What is new; the role comes first, alone."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class ChatChunkChoice(Answer):
    """What is new of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(Answer):
    """Each event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
    prompt_token_ids: list[int] | None = None
    """Where they were asked for: with the first event."""


class ResponseAnswer(Answer):
    """`POST /v1/responses`; status: incomplete where max_output_tokens, or the context, was reached."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    """Messages, and calls of tools."""
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    """Whatever was asked: nothing is stored."""
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: dict[str, Any] | None
    user: str | None


class Tokenized(Answer):
    """`POST /tokenize`. token_strs: where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    """`POST /detokenize`."""

    prompt: str


class Version(Answer):
    """`GET /version`: of roadie."""

    version: str


class Model(Answer):
    """The base model (parent: null), or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(Answer):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class AdapterAnswer(Answer):
    """One adapter, and where it is. on_disk: of its files, since they were read. path, content_hash, error: administrators."""

    name: str
    state: Literal["known", "loading", "resident", "unloading", "broken"]
    pinned: bool
    slot: int | None
    running: int
    queued: int
    requests: int
    tokens: int
    path: str | None
    on_disk: Literal["same", "changed", "gone"]
    content_hash: str | None
    error: str | None
    notes: list[str] | None
    """What of it is not as the base model has it; administrators."""


class LeftOutAnswer(Answer):
    """A folder among the adapters that is none, and why."""

    path: str
    reason: str


class AdaptersAnswer(Answer):
    """`GET /v1/adapters`. left_out: for administrators."""

    object: Literal["list"]
    data: list[AdapterAnswer]
    left_out: list[LeftOutAnswer]


class Figures(Answer):
    """How the engine stands, and counts since its start."""

    running: int
    queued: int
    slots: int
    slots_leased: int
    resident_adapters: int
    blocks: int
    blocks_free: int
    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    loads: int
    evictions: int
    uptime_s: float


class Status(Answer):
    """`GET /v1/status`: what the page shows. adapters: those this key may use; runs: null where the server does not train."""

    ready: bool
    model: str
    max_context_tokens: int
    chat: bool
    """Whether the model has a chat template."""
    is_admin: bool
    figures: Figures
    adapters: list[AdapterAnswer]
    runs: list[RunFigures] | None


class Health(Answer):
    """`GET /health` and `GET /ready`."""

    status: Literal["ok", "ready"]
