"""An engine without a model, for tests of what is around one: it counts, word by word, in its own thread.

    base model, prompt of 3 tokens    " base 3 0 1 2 3 ..."
    adapter legal                     " legal 3 0 1 2 ..."
    a blend                           " legal*0.7+terse*0.3 3 0 1 ..."

Each word is a token. With a temperature above 0 a word is `seed` + count instead. It keeps to the contract: one last output a
request, cancelled requests end, limits are kept, adapters come and go.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from roadie.errors import (
    AdapterBusy,
    CheckpointError,
    ConfigError,
    PromptTooLong,
    QueueFull,
    ShuttingDown,
    StateNotWritten,
    UnknownAdapter,
)
from roadie.serving.belongings import OwnChat
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    AdapterWish,
    EngineLimits,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Statistics,
    TokenLogprob,
    Unload,
    Usage,
)
from roadie.serving.grammars import Constraint
from roadie.serving.places import LeftOut

VOCABULARY = 2048


@dataclass
class _Job:
    request: GenerationRequest
    on_output: OnOutput
    words: list[str]
    count: int = 0
    text: str = ""
    is_cancelled: bool = False


@dataclass
class FakeEngine:
    """step_s: seconds a word. Setting `held` stops all progress while it is set."""

    step_s: float = 0.0
    max_queued: int = 1000
    adapter_names: tuple[str, ...] = ("legal", "terse", "pirate")
    broken: tuple[str, ...] = ()
    max_context_tokens: int = 512
    failing: BaseException | None = None
    folders_left_out: tuple[LeftOut, ...] = ()
    chats: dict[str, OwnChat] = field(default_factory=dict)
    _adapters: dict[str, AdapterStatus] = field(default_factory=dict)
    _jobs: dict[str, _Job] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.held = threading.Event()
        self.is_ready = True
        self._is_stopped = False
        self.requests: list[GenerationRequest] = []
        for name in self.adapter_names:
            self._adapters[name] = AdapterStatus(name, AdapterState.KNOWN, path=f"/srv/adapters/{name}")
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(self.max_context_tokens, 64, self.max_queued, self.max_queued, 64, 8, VOCABULARY)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self.lock:
            self.is_ready, self._is_stopped = False, True
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.on_output(self._last(job, FinishReason.FAILED, ShuttingDown("the engine was stopped")))

    def drain(self, timeout_s: float | None = None) -> bool:
        self.is_ready = False
        give_up_s = time.monotonic() + (timeout_s or 1e9)
        while self._jobs and time.monotonic() < give_up_s:
            time.sleep(0.005)
        return not self._jobs

    def prepare(self, constraint: Constraint) -> None:
        """It keeps to none; one of "slow" takes as long as it is held, and "wrong" is refused."""
        while constraint.source == "slow" and self.held.is_set():
            time.sleep(0.001)
        if constraint.source == "wrong":
            raise ConfigError("got a constraint that cannot be used")

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        if self.failing is not None:
            raise self.failing
        names = _names(request.adapter)
        with self.lock:
            self._check(request, names)
            self._jobs[request.request_id] = _Job(request, on_output, _words(request))
            self.requests.append(request)
            self.counts["requests"] += 1

    def _check(self, request: GenerationRequest, names: tuple[str, ...]) -> None:
        if not self.is_ready:
            raise ShuttingDown("the engine takes no requests")
        for name in names:
            if name not in self._adapters:
                raise UnknownAdapter(f"got adapter {name!r}; wanted one that is known")
        if len(request.prompt_ids) + request.sampling.max_tokens > self.max_context_tokens:
            raise PromptTooLong("too long")
        if not request.prompt_ids or max(request.prompt_ids) >= VOCABULARY:
            raise ConfigError(f"got a token that is not in the vocabulary; wanted tokens from 0 to {VOCABULARY - 1}")
        if len(self._jobs) >= self.max_queued:
            self.counts["refused"] += 1
            raise QueueFull("too many wait", 2.5)

    def cancel(self, request_id: str) -> bool:
        with self.lock:
            job = self._jobs.get(request_id)
            if job is not None:
                job.is_cancelled = True
            return job is not None

    def _run(self) -> None:
        while not self._is_stopped:
            with self.lock:
                jobs = list(self._jobs.values())
            for job in jobs:
                self._step(job)
            time.sleep(self.step_s or (0.0 if jobs else 0.001))

    def _step(self, job: _Job) -> None:
        broken = [name for name in _names(job.request.adapter) if name in self.broken]
        if job.is_cancelled:
            self._end(job, self._last(job, FinishReason.CANCELLED))
        elif broken:
            error = CheckpointError(f"/srv/adapters/{broken[0]}/adapter_model.safetensors: got rubbish")
            self._adapters[broken[0]] = replace(self._adapters[broken[0]], state=AdapterState.BROKEN, error=str(error))
            self._end(job, self._last(job, FinishReason.FAILED, error))
        elif not self.held.is_set():
            self._advance(job)

    def _advance(self, job: _Job) -> None:
        rules = job.request.sampling
        if rules.max_tokens == 0:
            self._end(job, replace(self._last(job, FinishReason.LENGTH), prompt_logprobs=_scores(job.request)))
            return
        word = f" {job.words[job.count]}" if job.count < len(job.words) else f" {job.count - len(job.words)}"
        if rules.temperature > 0 and rules.seed is not None:
            word = f" {rules.seed + job.count}"
        job.count += 1
        is_last, finish = job.count >= rules.max_tokens, FinishReason.LENGTH
        stop = next((stop for stop in rules.stop if stop in job.text + word), None)
        if stop is not None:
            whole = job.text + word
            word, is_last, finish = whole[: whole.index(stop)][len(job.text) :], True, FinishReason.STOP
        job.text += word
        for name in _names(job.request.adapter):
            status = self._adapters[name]
            tokens = status.num_tokens + 1
            self._adapters[name] = replace(status, state=AdapterState.RESIDENT, slot=1, num_tokens=tokens)
        self.counts["generated"] += 1
        output = Output(job.request.request_id, (job.count % VOCABULARY,), word, _logprobs(job))
        output = replace(output, prompt_logprobs=_scores(job.request) if job.count == 1 else ())
        if is_last:
            self._end(job, replace(output, finish=finish, usage=self._usage(job)))
        else:
            job.on_output(output)

    def _end(self, job: _Job, output: Output) -> None:
        with self.lock:
            if self._jobs.pop(job.request.request_id, None) is None:
                return
            self.counts[output.finish.value] += 1
        job.on_output(output)

    def _last(self, job: _Job, finish: FinishReason, error: Exception | None = None) -> Output:
        return Output(job.request.request_id, finish=finish, usage=self._usage(job), error=error)

    def _usage(self, job: _Job) -> Usage:
        return Usage(len(job.request.prompt_ids), job.count, 0)

    @property
    def num_live(self) -> int:
        return len(self._jobs)

    def statistics(self) -> Statistics:
        counts = self.counts
        return Statistics(
            num_running=len(self._jobs),
            num_queued=0,
            num_slots=8,
            num_slots_leased=0,
            num_resident=sum(status.slot is not None for status in self._adapters.values()),
            num_blocks=100,
            num_blocks_free=100 - len(self._jobs),
            num_requests=counts["requests"],
            num_finished=counts["stop"] + counts["length"],
            num_cancelled=counts["cancelled"],
            num_failed=counts["failed"],
            num_refused=counts["refused"],
            num_prompt_tokens=0,
            num_cached_prompt_tokens=0,
            num_generated_tokens=counts["generated"],
            num_loads=counts["loads"],
            num_load_failures=0,
            num_evictions=0,
            num_steps=0,
            seconds_computing=0.0,
        )

    def adapters(self) -> tuple[AdapterStatus, ...]:
        return tuple(self._adapters[name] for name in sorted(self._adapters))

    def has_adapter(self, name: str) -> bool:
        return name in self._adapters

    def own_chat(self, name: str) -> OwnChat | None:
        return self.chats.get(name)

    def left_out(self) -> tuple[LeftOut, ...]:
        return self.folders_left_out

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        def load() -> AdapterStatus:
            if path is not None and ("corrupt" in path or ".." in path or path.startswith("/etc")):
                raise CheckpointError(f"{path}: got what cannot be used")
            if path == "full":
                raise StateNotWritten("the disk is full")
            if name in self._adapters and self._adapters[name].slot is not None and not replace:
                raise ConfigError(f"got {name!r}, which is loaded already; use replace")
            self.counts["loads"] += 1
            self._adapters[name] = AdapterStatus(name, AdapterState.RESIDENT, path=path, slot=len(self._adapters))
            return self._adapters[name]

        return _settled(load)

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        def unload() -> AdapterStatus:
            if name not in self._adapters:
                raise UnknownAdapter(f"got adapter {name!r}; wanted one that is known")
            users = [job for job in self._jobs.values() if name in _names(job.request.adapter)]
            if users and how is Unload.REFUSE:
                raise AdapterBusy(f"{len(users)} requests use {name!r}")
            for job in users if how is Unload.CANCEL else ():
                job.is_cancelled = True
            return replace(self._adapters.pop(name), state=AdapterState.KNOWN, slot=None)

        return _settled(unload)

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        def pin() -> AdapterStatus:
            if name not in self._adapters:
                raise UnknownAdapter(f"got adapter {name!r}; wanted one that is known")
            self._adapters[name] = replace(self._adapters[name], is_pinned=pinned, state=AdapterState.RESIDENT, slot=1)
            return self._adapters[name]

        return _settled(pin)


def _settled(task: object) -> Future[AdapterStatus]:
    future: Future[AdapterStatus] = Future()
    try:
        future.set_result(task())  # type: ignore[operator]
    except Exception as error:
        future.set_exception(error)
    return future


def _names(wish: AdapterWish) -> tuple[str, ...]:
    return () if wish is None else (wish,) if isinstance(wish, str) else tuple(wish)


def _words(request: GenerationRequest) -> list[str]:
    wish = request.adapter
    if isinstance(wish, Mapping):
        wish = "+".join(f"{name}*{weight:g}" for name, weight in wish.items())
    return [wish or "base", str(len(request.prompt_ids))]


def _scores(request: GenerationRequest) -> tuple[TokenLogprob, ...]:
    """The token at place i has ln p = -i and rank 2; before it comes a token that is one less."""
    if request.scoring is None or request.scoring.last == 0:
        return ()
    num_top = request.scoring.top
    return tuple(
        TokenLogprob(token, -float(place), tuple((token - 1 + rank, -place + 0.5 - rank) for rank in range(num_top)), 2)
        for place, token in enumerate(request.prompt_ids[1:], 1)
    )


def _logprobs(job: _Job) -> tuple[TokenLogprob, ...]:
    if job.request.sampling.logprobs is None:
        return ()
    top = tuple((100 + rank, -0.5 - rank) for rank in range(job.request.sampling.logprobs))
    return (TokenLogprob(job.count % VOCABULARY, -0.5, top),)
