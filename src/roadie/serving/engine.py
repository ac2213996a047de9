"""What a serving engine promises: the values that go in and come out, and the verbs between them.

    engine.start()
    engine.submit(GenerationRequest("r1", prompt_ids, adapter="legal"), on_output)   # from any thread
    ...                                    on_output(Output(text=" is", token_ids=(338,)))     from the engine's thread
    ...                                    on_output(Output(finish=FinishReason.STOP, usage=Usage(7, 12)))
    engine.stop()

`roadie.serving.streams.stream` makes an asynchronous iterator of it. Every request ends with exactly one output whose `finish` is
set. A request keeps the version of its adapter that it started with, whatever is loaded, replaced or unloaded meanwhile.

Whatever an engine raises is in `roadie.errors`: `UnknownAdapter`, `PromptTooLong`, `QueueFull` (with `retry_after_s`),
`ShuttingDown`, `AdapterBusy`, `EngineFailed`, and `CheckpointError` or `AdapterError` for adapters that cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

from roadie.engine.turns import TurnSettings
from roadie.errors import ConfigError
from roadie.serving.belongings import OwnChat
from roadie.serving.grammars import Constraint
from roadie.serving.places import LeftOut

AdapterWish: TypeAlias = "str | Mapping[str, float] | None"
"""An adapter's name, weights by name (a blend, or the strength of one), or None for the base model."""

TABLE_DTYPES = ("float32", "bfloat16", "float16")
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token, a stop string, or the end of what the constraint allows
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    FAILED = "failed"  # see Output.error


class AdapterState(str, Enum):
    """Where an adapter is."""

    KNOWN = "known"  # on disk, in no slot
    LOADING = "loading"
    RESIDENT = "resident"  # in a slot
    UNLOADING = "unloading"  # takes no new requests, running ones go on
    BROKEN = "broken"  # its files cannot be used; see AdapterStatus.error


class OnDisk(str, Enum):
    """What has become of an adapter's files since they were read (of one that was never read: whether they are there)."""

    SAME = "same"
    CHANGED = "changed"  # what is resident is the old version; load it with replace for the new one
    GONE = "gone"  # what is resident goes on until it is unloaded, or gives its slot to another


class Unload(str, Enum):
    """What becomes of an adapter's requests when it is unloaded. In each case new requests are refused from now on."""

    WAIT = "wait"  # queued and running requests are served first
    REFUSE = "refuse"  # raises AdapterBusy where there are any; nothing changes then
    CANCEL = "cancel"  # queued and running requests are cancelled


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises `ConfigError` for values out of range.

    max_tokens 0: none, for prompts that are only scored. temperature 0 is greedy. seed: int64; the same seed gives the same
    tokens whoever else is in the batch (up to the rounding of logits); None draws one. top_k 0: no limit. stop: strings that end
    the text, and are not part of it unless include_stop.
    stop_token_ids: beside the model's own end-of-sequence tokens, which ignore_eos leaves out. logprobs: None, or how many
    alternatives to report beside the chosen token (0 to 20). logit_bias: added to the logits of tokens, by id.
    repetition_penalty: see `sampling`; 1: none. min_tokens: before so many, nothing ends the text but max_tokens.
    skip_special_tokens: leave the tokenizer's special tokens out of the text.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        for token_id, bias in self.logit_bias.items():
            _within(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise ConfigError(f"got stop={self.stop!r}; wanted at most {MAX_STOP_STRINGS} strings, none of them empty")


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise ConfigError(f"got {name}={value!r}; wanted a number from {lowest:g} to {highest:g}")
    if isinstance(lowest, int) and not isinstance(value, int):
        raise ConfigError(f"got {name}={value!r}; wanted a whole number from {lowest} to {highest}")


@dataclass(frozen=True)
class Scoring:
    """Which tokens of a prompt to tell the logprobs of. Raises `ConfigError` for values out of range.

    last: so many tokens at its end; None: all of it but the first token, which nothing precedes. top: how many of the most likely
    tokens to report at each (0 to 20). token_ids: others whose logprobs are reported at each, whatever stands there.
    The last token is not read where nothing is generated: to score what may follow a prompt, put any token behind it.
    """

    last: int | None = None
    top: int = 0
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.last is not None:
            _within("last", self.last, 0, 2**31 - 1)
        _within("top", self.top, 0, MAX_TOP_LOGPROBS)


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued, or scored, or both. request_id: unique among active requests; tenant: who is charged for it.

    whole: the caller looks at nothing before the end, so that an engine may give all of it as one output. scoring: None: the
    prompt is not scored. Tokens before the first that is scored may come from another request's key-value blocks.
    constraint: what the text must be; where nothing can follow it ends, as by an end token.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    adapter: AdapterWish = None
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = "default"
    whole: bool = False
    scoring: Scoring | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """ln p of a token before temperature and penalties, and the most likely tokens there: (id, ln p), best first.

    Of a prompt's tokens also: rank, 1 for the most likely (0: not told), and others that were asked for, in their order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; cached_tokens: of the prompt, taken from another request's key-value blocks."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Output:
    """What one step of the engine gave a request.

    text: what may be shown now. It can lag behind token_ids (half a character, what may become a stop string), and is complete
    with the last output; a stop string is cut off, its tokens stay in token_ids. logprobs: as many as token_ids where asked for.
    prompt_logprobs: of the scored tokens of the prompt, with the first output.
    usage: with the last output. error: with FinishReason.FAILED.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


OnOutput: TypeAlias = Callable[[Output], None]
"""Called from the engine's thread, in order, with the last output once; it must return at once and not raise."""


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter, as an operator sees it. content_hash: of its parameters (hex), None where it was never read."""

    name: str
    state: AdapterState
    path: str | None = None
    on_disk: OnDisk = OnDisk.SAME
    content_hash: str | None = None
    is_pinned: bool = False
    slot: int | None = None
    num_running: int = 0
    num_queued: int = 0
    num_requests: int = 0  # accepted since the start
    num_tokens: int = 0  # generated since the start
    error: str | None = None
    notes: tuple[str, ...] = ()  # what of it is not as the base model has it


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is sized. Raises `ConfigError` for values that cannot work.

    num_slots: adapters and blends in memory at once. table_dtype: of their vectors there, by its name in torch: float32, or
    bfloat16 or float16 for half the memory, rounded once (see `roadie.AdapterBank`). num_blocks, page_size: the key-value cache,
    in blocks of page_size tokens. max_batch_tokens: of one step; longer prompts take several. max_running: requests in a step.
    max_context_tokens: None: the model's. allow_unknown_version: run with a transformers that this release was not tested with.
    turns: how time is shared with training, where there is any.
    """

    num_slots: int = 64
    table_dtype: str = "float32"
    page_size: int = 16
    num_blocks: int = 1024
    max_batch_tokens: int = 512
    max_running: int = 64
    max_queued: int = 1024
    max_queued_per_tenant: int = 1024
    max_running_per_tenant: int = 64
    max_context_tokens: int | None = None
    share_prefixes: bool = True
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_adapter_bytes: int = 1 << 30
    allow_unknown_version: bool = False
    turns: TurnSettings = field(default_factory=TurnSettings)

    def __post_init__(self) -> None:
        for name in ("num_slots", "page_size", "num_blocks", "max_batch_tokens", "max_running", "max_queued"):
            _within(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("max_queued_per_tenant", "max_running_per_tenant", "max_adapter_bytes"):
            _within(name, getattr(self, name), 1, 2**62)
        if self.table_dtype not in TABLE_DTYPES:
            raise ConfigError(f"got table_dtype={self.table_dtype!r}; wanted one of {', '.join(TABLE_DTYPES)}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"got max_batch_tokens={self.max_batch_tokens} for max_running={self.max_running}; wanted a token a request"
            )


@dataclass(frozen=True)
class EngineLimits:
    """What a request may ask for: tokens of prompt and completion together, and what the engine holds at once."""

    max_context_tokens: int
    max_running: int
    max_queued: int
    max_queued_per_tenant: int
    max_running_per_tenant: int
    num_slots: int
    vocabulary_size: int


@dataclass(frozen=True)
class Statistics:
    """Counts since the start, and how things stand now."""

    num_running: int
    num_queued: int
    num_slots: int
    num_slots_leased: int
    num_resident: int
    num_blocks: int
    num_blocks_free: int  # blocks kept only for prefix sharing count as free
    num_requests: int
    num_finished: int
    num_cancelled: int
    num_failed: int
    num_refused: int
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_generated_tokens: int
    num_loads: int
    num_load_failures: int
    num_evictions: int
    num_steps: int
    seconds_computing: float
    queued_by_tenant: Mapping[str, int] = field(default_factory=dict)
    running_by_tenant: Mapping[str, int] = field(default_factory=dict)
    num_training_tenants: int = 0
    num_training_waiting: int = 0
    num_training_passes: int = 0
    num_training_tokens: int = 0
    num_training_steps: int = 0
    num_training_failed: int = 0
    seconds_training: float = 0.0
    training_share: float = 0.0  # what the operator has set
    training_owed_s: float = 0.0  # what training may spend before it is the turn of requests


class Engine(Protocol):
    """A base model, many adapters, one batch. All methods may be called from any thread."""

    @property
    def limits(self) -> EngineLimits:
        """What a request may ask for."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: started, not draining, not failed."""

    def start(self) -> None:
        """Begin; returns when requests are taken. Raises `ServingError` where this engine cannot run."""

    def stop(self) -> None:
        """End now: active requests end as FAILED with `ShuttingDown`; whatever was hooked is as it was."""

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for the active ones; whether all ended in time. Call `stop` afterwards."""

    def prepare(self, constraint: Constraint) -> None:
        """Let `submit` find a constraint compiled, which takes up to seconds. Raises `ConfigError` for one that cannot be."""

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """Queue a request. Raises `UnknownAdapter`, `PromptTooLong`, `QueueFull`, `ShuttingDown` or `ConfigError`."""

    def cancel(self, request_id: str) -> bool:
        """End a request as CANCELLED at the next step; whether it was active."""

    def statistics(self) -> Statistics:
        """How things stand."""

    def adapters(self) -> tuple[AdapterStatus, ...]:
        """All adapters that there are, by name: in the folder of adapters, loaded from elsewhere, pinned, or in a slot.

        Whatever a request may ask for is among them, and can be unloaded.
        """

    def has_adapter(self, name: str) -> bool:
        """Whether there is an adapter of exactly this name."""

    def own_chat(self, name: str) -> OwnChat | None:
        """The chat template that an adapter brings; None where it has none, or is not there."""

    def left_out(self) -> tuple[LeftOut, ...]:
        """Folders among the adapters that are none, and why."""

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        """Read, check and publish an adapter without holding up the requests that run.

        path: a folder within the allowed ones; None: the folder `name` of the adapter directory, read again.
        The future raises `ConfigError` for a name that is not allowed, or taken unless replace; `CheckpointError` or
        `AdapterError` for what cannot be used. A replacement that fails leaves the old adapter.
        """

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        """Let an adapter go, and forget it until it is loaded again. The future raises `UnknownAdapter` or `AdapterBusy`."""

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        """Keep an adapter in its slot (it is loaded where it is not resident), or let it give way again."""
