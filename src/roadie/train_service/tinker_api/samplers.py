"""Samples: whose weights, by which rules, and what becomes of a request for several of them.

Weights that are sampled from are adapters of the server's engine, called ~TENANT/CHECKPOINT, which their tenant alone can see.
Those that were used last stay there; others are read from their folder when they are asked for again.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from tinker import types

from roadie import checkpoint
from roadie.errors import ConfigError, EngineFailed, QueueFull, RoadieError, ShuttingDown, StateNotWritten
from roadie.serving import (
    AdapterStatus,
    ContinuousBatchingEngine,
    EngineLimits,
    FinishReason,
    GenerationRequest,
    Output,
    Sampling,
    Scoring,
)
from roadie.train_service.tinker_api import wire
from roadie.train_service.tinker_api.futures import PROTOBUF, SAMPLE, Asked, Futures, Result, failure
from roadie.train_service.tinker_api.records import Checkpoint, Records, Sampler, unknown
from roadie.train_service.tinker_api.store import Store
from roadie.train_service.tinker_api.tasks import Tasks

MAX_SAMPLES = 1024
MAX_PUBLISHED = 1024
WAIT_S = 60.0
_OWN = "~"
_numbers = count()  # of requests to the engine: one that is asked for again may find the one before still leaving


def owner_of(adapter: str) -> str | None:
    """Whose an adapter of the engine is; None for one that is not of this service."""
    return adapter[1:].partition("/")[0] if adapter.startswith(_OWN) else None


@dataclass(eq=False)
class _Job:
    """Samples that are being made. num_open: of those without an end."""

    asked: Asked
    requests: Sequence[GenerationRequest]
    num_top: int
    prompt: wire.PromptWish | None
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    num_open: int = 0

    @property
    def error(self) -> Exception | None:
        """What one of them has failed with."""
        for output in (outputs[-1] for outputs in self.outputs.values()):
            if output.finish is FinishReason.CANCELLED:
                return ConfigError("got a cancellation; wanted to be let finish; ask again")
            if output.finish is FinishReason.FAILED:
                return output.error or EngineFailed("the engine has failed")
        return None

    @property
    def result(self) -> Result:
        """Of all of them."""
        samples = [self.outputs[request.request_id] for request in self.requests]
        return Result(PROTOBUF, wire.sample_bytes(samples, self.num_top, self.prompt))


class Samplers:
    """See the module."""

    def __init__(
        self, engine: ContinuousBatchingEngine, futures: Futures, records: Records, store: Store, tasks: Tasks
    ) -> None:
        self._engine, self._futures, self._records, self._store, self._tasks = engine, futures, records, store, tasks
        self._published: OrderedDict[str, None] = OrderedDict()
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    # Weights.

    def publish(self, trains: str, tenant: str, checkpoint: str) -> Future[AdapterStatus]:
        """Let the weights of a run, as they are in its turn, be those of a checkpoint to come. trains: its name in the engine."""
        name = f"{_OWN}{tenant}/{checkpoint}"
        published = self._engine.publish(trains, name)
        self._use(name)
        return published

    def gone(self, found: Checkpoint) -> None:
        """Forget the weights of a checkpoint that is no longer there."""
        name = f"{_OWN}{found.tenant}/{found.id}"
        with self._lock:
            was_there = name in self._published
            self._published.pop(name, None)
        if was_there:
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        if self._engine.has_adapter(name):
            self._engine.unload_adapter(name)

    def _use(self, name: str) -> None:
        with self._lock:
            self._published[name] = None
            self._published.move_to_end(name)
            over = [self._published.popitem(last=False)[0] for _ in range(len(self._published) - MAX_PUBLISHED)]
        for each in over:
            self._let_go(each)

    def _bring(self, sampler: Sampler) -> str | None:
        """The adapter to ask the engine for; raises `ApiError` (404) where the weights are gone."""
        if sampler.checkpoint is None:
            return None
        found = self._records.find(Checkpoint, sampler.checkpoint)
        name = f"{_OWN}{sampler.tenant}/{sampler.checkpoint}"
        if found is None and name not in self._published:
            raise unknown("checkpoint", sampler.path or sampler.id)
        if name not in self._published:
            assert found is not None
            self._engine.give_adapter(name, checkpoint.load(self._store.path(found.folder))).result(WAIT_S)
        self._use(name)
        if found is not None and time.time() - found.used_s > WAIT_S:
            self._records.change(Checkpoint, found.id, durable=False, used_s=time.time())
        return name

    # Samples.

    def ask(self, request: types.SampleRequest, body: bytes, sampler: Sampler) -> str:
        """Take a request; the id of its future. Raises `ApiError`, `ConfigError`, `ServingError`."""
        seq = request.seq_id if request.sampling_session_id is not None else secrets.randbits(52)
        if seq is None or not 0 <= seq < 2**63:
            raise ConfigError(f"got seq_id={seq}; wanted a number of its own for each request of a session")
        asked = Asked(f"{sampler.id}:{seq}", sampler.tenant, sampler.id, seq, SAMPLE, body)
        if not self._futures.exists(asked.id):
            job = self._job(asked, request, sampler)
            with self._lock:
                if asked.id in self._jobs:
                    return asked.id
                self._jobs[asked.id] = job
            try:
                self._futures.open(asked)
                self._begin(job)
            except BaseException:
                self._jobs.pop(asked.id, None)
                with contextlib.suppress(StateNotWritten):
                    self._futures.drop(asked.id)
                raise
        return asked.id

    def again(self, asked: Asked) -> None:
        """Make samples that were asked for before a restart."""
        sampler = self._records.find(Sampler, asked.owner)
        try:
            if sampler is None:
                raise unknown("sampler", asked.owner)
            job = self._job(asked, types.SampleRequest.model_validate_json(asked.body), sampler)
            self._jobs[asked.id] = job
            self._begin(job)
        except QueueFull as error:
            self._jobs.pop(asked.id, None)
            threading.Timer(error.retry_after_s, self._tasks.submit, (self.again, asked)).start()
        except Exception as error:
            self._futures.finish(asked.id, failure(error))

    def cancel(self, id: str, tenant: str) -> None:
        """Stop making samples that nobody waits for."""
        job = self._jobs.get(id)
        if job is not None and job.asked.tenant == tenant:
            for request in job.requests:
                self._engine.cancel(request.request_id)

    def _job(self, asked: Asked, request: types.SampleRequest, sampler: Sampler) -> _Job:
        check(request)
        prompt = _tokens(request)
        rules = sampling_of(request, len(prompt), self._engine.limits)
        scoring = _scoring(request)
        adapter = self._bring(sampler)
        requests = [
            GenerationRequest(
                f"{asked.id}#{number}:{next(_numbers)}",
                prompt,
                adapter,
                rule,
                sampler.tenant,
                True,
                None if number else scoring,
            )
            for number, rule in enumerate(rules)
        ]
        wants = bool(request.prompt_logprobs)
        told = wire.PromptWish(len(prompt), logprobs=wants, num_top=request.topk_prompt_logprobs) if scoring else None
        return _Job(asked, requests, request.topk_sample_logprobs, told)

    def _begin(self, job: _Job) -> None:
        job.num_open = len(job.requests)
        job.outputs = {request.request_id: [] for request in job.requests}
        for number, request in enumerate(job.requests):
            try:
                self._engine.submit(request, lambda output: self._take(job, output))
            except BaseException:
                job.num_open = -1  # what is under way ends for nobody
                for before in job.requests[:number]:
                    self._engine.cancel(before.request_id)
                raise

    def _take(self, job: _Job, output: Output) -> None:
        """In the engine's thread."""
        job.outputs[output.request_id].append(output)
        if output.finish is not None and job.num_open > 0:
            job.num_open -= 1
            if not job.num_open:
                self._tasks.submit(self._end, job)

    def _end(self, job: _Job) -> None:
        self._jobs.pop(job.asked.id, None)
        error = job.error
        if isinstance(error, (ShuttingDown, EngineFailed)):  # made again after the restart
            return
        try:
            result = job.result if error is None else failure(error)
        except RoadieError as other:
            result = failure(other)
        self._futures.finish(job.asked.id, result)


_LACKING = {
    "target_prompt_logprobs": "logprobs of tokens by place; use forward of a training client",
    "prompt_alt_tokens_k": "draws at each place of a prompt",
    "record_stability_info": "records for stable_reinforce",
}


def check(request: types.SampleRequest) -> None:
    """Raise `ConfigError` for what this server does not have, and for numbers that cannot be."""
    for name, what in _LACKING.items():
        if getattr(request, name):
            raise ConfigError(f"got {name}; this server has no {what}; leave it out")
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise ConfigError(f"got num_samples={request.num_samples}; wanted 1 to {MAX_SAMPLES}; ask several times")


def _tokens(request: types.SampleRequest) -> tuple[int, ...]:
    try:
        return tuple(request.prompt.to_ints())
    except ValueError:
        raise ConfigError("got a prompt that is not text alone; wanted chunks of tokens") from None


def _scoring(request: types.SampleRequest) -> Scoring | None:
    if not request.prompt_logprobs and not request.topk_prompt_logprobs:
        return None
    return Scoring(request.prompt_logprobs_last_n, request.topk_prompt_logprobs)


def sampling_of(request: types.SampleRequest, num_prompt_tokens: int, limits: EngineLimits) -> list[Sampling]:
    """The rules of each sample: with a seed each has one of its own, and the same ones the next time."""
    params = request.sampling_params
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    words = tuple(each for each in stop or () if isinstance(each, str))
    room = max(1, limits.max_context_tokens - num_prompt_tokens)
    seeds = [None if params.seed is None else (params.seed + number) % 2**63 for number in range(request.num_samples)]
    return [
        Sampling(
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(0, params.top_k),
            seed=seed,
            stop=words,
            stop_token_ids=tuple(each for each in stop or () if isinstance(each, int)),
            ignore_eos=stop is not None and not stop,
            logprobs=request.topk_sample_logprobs,
        )
        for seed in seeds
    ]
