"""vLLM with roadie's plug-in as an engine of a replica: the contract of `roadie.serving.engine` over vLLM's `AsyncLLM`.

vLLM has a loop of its own, in a thread. A blend is made where the plug-in lets adapters in, and is one more adapter there. Slots,
the key-value cache and the batch are vLLM's, sized by its own settings (`vllm:` in deploy.yaml, which are those of
`AsyncEngineArgs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from itertools import count
from typing import Any

from roadie.bank.blends import Blend, names_in
from roadie.errors import (
    AdapterBusy,
    AdapterError,
    ConfigError,
    EngineFailed,
    QueueFull,
    RoadieError,
    ShuttingDown,
    UnknownAdapter,
)
from roadie.serving.belongings import OwnChat
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    EngineLimits,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Sampling,
    Statistics,
    TokenLogprob,
    Unload,
    Usage,
)
from roadie.serving.grammars import Constraint
from roadie.serving.places import LeftOut
from roadie.serving.validation import check_request, key_of
from roadie.training.models import ModelSource

START_TIMEOUT_S = 3600.0
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmEngine:
    """An `Engine`. options: of vLLM's `AsyncEngineArgs`, beside those that make it one for RoAd. Raises `ConfigError`."""

    def __init__(self, source: ModelSource, settings: EngineSettings, options: Mapping[str, Any]) -> None:
        self._source, self._settings, self._options = source, settings, dict(options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="roadie-vllm", daemon=True)
        self._llm: Any = None
        self._limits: EngineLimits | None = None
        self._requests: dict[str, Any] = {}  # vLLM's request for each adapter, by name
        self._pinned: set[str] = set()
        self._live: dict[str, tuple[GenerationRequest, Future[None]]] = {}
        self._by_adapter: dict[str, Counter[str]] = {}
        self._counts: Counter[str] = Counter()
        self._ids = count(1)
        self._is_taking = False

    # Life.

    def start(self) -> None:
        """See `Engine.start`."""
        self._thread.start()
        self._in_loop(self._begin()).result(START_TIMEOUT_S)
        self._is_taking = True

    async def _begin(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from roadie.vllm.settings import engine_arguments

        given = {
            "model": self._source.place,
            "revision": self._source.revision,
            "trust_remote_code": self._source.trust_remote_code,
            "max_num_seqs": self._settings.max_running,
            **engine_arguments(self._settings.num_slots),
            **self._options,
        }
        if self._settings.max_context_tokens is not None:
            given.setdefault("max_model_len", self._settings.max_context_tokens)
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
        except TypeError as error:
            raise ConfigError(
                f"got settings of vllm that it does not know ({error}); wanted those of AsyncEngineArgs"
            ) from None
        model = self._llm.model_config
        self._limits = EngineLimits(
            max_context_tokens=int(model.max_model_len),
            max_running=self._settings.max_running,
            max_queued=self._settings.max_queued,
            max_queued_per_tenant=self._settings.max_queued_per_tenant,
            max_running_per_tenant=self._settings.max_running_per_tenant,
            num_slots=self._settings.num_slots,
            vocabulary_size=int(model.get_vocab_size()),
        )

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """See `Engine.stop`."""
        self._is_taking = False
        for _, flight in list(self._live.values()):
            flight.cancel()
        if self._llm is not None:
            self._llm.shutdown()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def drain(self, timeout_s: float | None = None) -> bool:
        """See `Engine.drain`."""
        self._is_taking = False
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._live and (give_up_s is None or time.monotonic() < give_up_s):
            time.sleep(0.05)
        return not self._live

    @property
    def is_ready(self) -> bool:
        """See `Engine.is_ready`."""
        return self._is_taking and not self._llm.errored

    @property
    def limits(self) -> EngineLimits:
        """See `Engine.limits`."""
        if self._limits is None:
            raise ShuttingDown("got an engine that was not started; wanted one that runs; call start")
        return self._limits

    # Requests.

    def prepare(self, constraint: Constraint) -> None:
        """See `Engine.prepare`."""
        raise ConfigError(
            "got a constraint for replicas with vLLM, which keep answers to none; wanted a request without"
        )

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """See `Engine.submit`."""
        if request.scoring is not None:
            raise ConfigError(
                "got a prompt to be scored, for vLLM; wanted one to continue alone; roadie's own engine scores"
            )
        check_request(request, self.limits, has_tokenizer=True)
        if not self.is_ready:
            raise ShuttingDown("got a request for an engine that takes none; try another server, or later")
        if request.request_id in self._live:
            raise ConfigError(f"got request id {request.request_id!r}, which is active; wanted one of its own")
        key = key_of(request, self.limits)
        lora = self._lora_of(key)
        if len(self._live) >= self.limits.max_running + self.limits.max_queued:
            self._counts["refused"] += 1
            raise QueueFull(f"{self.limits.max_queued} requests wait already; come back later", 1.0)
        self._count(key if isinstance(key, str) else None, "requests", 1)
        work = self._serve(request, lora, on_output)
        self._live[request.request_id] = request, self._in_loop(work)

    def _lora_of(self, key: str | Blend | None) -> Any:
        """vLLM's request for an adapter, or a blend; raises `UnknownAdapter`."""
        from vllm.lora.request import LoRARequest

        from roadie.vllm.resolver import blend_path

        for name in names_in(key):
            if name not in self._requests:
                raise UnknownAdapter(f"got adapter {name!r}, which is not loaded; wanted one that is")
        if isinstance(key, Blend):
            path = blend_path(dict(key.weights))
            return LoRARequest(lora_name=path, lora_int_id=1, lora_path=path)  # each content gets a number of its own
        return None if key is None else self._requests[key]

    def _count(self, name: str | None, what: str, number: int) -> None:
        self._counts[what] += number
        if name is not None:
            self._by_adapter.setdefault(name, Counter())[what] += number

    async def _serve(self, request: GenerationRequest, lora: Any, on_output: OnOutput) -> None:
        """One request, to its last output."""
        request_id = request.request_id
        try:
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            stream = self._llm.generate(prompt, sampling_params(request.sampling), request_id, lora_request=lora)
            last = await self._pass_on(request, stream, on_output)
        except asyncio.CancelledError:
            last = Output(request_id, finish=FinishReason.CANCELLED)
        except Exception as error:
            reason = error.__cause__  # of a blend that cannot be made
            failed = reason if isinstance(reason, RoadieError) else EngineFailed(f"vLLM failed at a request: {error}")
            last = Output(request_id, finish=FinishReason.FAILED, error=failed)
        finally:
            self._live.pop(request_id, None)
        on_output(last)

    async def _pass_on(self, request: GenerationRequest, stream: Any, on_output: OnOutput) -> Output:
        num_tokens = 0
        async for result in stream:
            part = result.outputs[0]
            num_tokens += len(part.token_ids)
            self._count(request.adapter if isinstance(request.adapter, str) else None, "tokens", len(part.token_ids))
            output = Output(
                request.request_id, tuple(part.token_ids), part.text, logprobs_of(part, request.sampling.logprobs)
            )
            if not result.finished:
                on_output(output)
                continue
            cached = result.num_cached_tokens or 0
            finish = _FINISH.get(part.finish_reason, FinishReason.CANCELLED)
            usage = Usage(len(request.prompt_ids), num_tokens, cached)
            return Output(output.request_id, output.token_ids, output.text, output.logprobs, finish, usage)
        raise EngineFailed("the answer has no end")

    def cancel(self, request_id: str) -> bool:
        """See `Engine.cancel`."""
        entry = self._live.get(request_id)
        if entry is None:
            return False
        entry[1].cancel()
        return True

    # Adapters.

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        """See `Engine.load_adapter`; path is not None."""
        return self._in_loop(self._load(name, path, replace))

    async def _load(self, name: str, path: str | None, replace: bool) -> AdapterStatus:
        from vllm.lora.request import LoRARequest

        if path is None or (name in self._requests and not replace):
            raise ConfigError(f"got {name!r}, which is loaded already, or no path; use replace, or unload it first")
        request = LoRARequest(lora_name=name, lora_int_id=next(self._ids), lora_path=path)
        try:
            await self._llm.add_lora(request)
        except Exception as error:
            raise AdapterError(str(error)) from None
        self._requests[name] = request
        if name in self._pinned:
            await self._pin(name, True)
        self._counts["loads"] += 1
        return self._status(name)

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        """See `Engine.unload_adapter`."""
        return self._in_loop(self._unload(name, how))

    async def _unload(self, name: str, how: Unload) -> AdapterStatus:
        if name not in self._requests:
            raise UnknownAdapter(f"got adapter {name!r}, which is not loaded; wanted one that is")
        users = [(request.request_id, flight) for request, flight in self._live.values() if request.adapter == name]
        if users and how is Unload.REFUSE:
            raise AdapterBusy(f"got adapter {name!r}, which {len(users)} requests use; wait for them, or cancel them")
        del self._requests[name]
        self._pinned.discard(name)
        for request_id, _ in users if how is Unload.CANCEL else ():
            self.cancel(request_id)
        for _, flight in users:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.wrap_future(flight)
        self._forget(name)
        return AdapterStatus(name, AdapterState.KNOWN)

    def _forget(self, name: str) -> None:
        from roadie.vllm.frontend import admissions_of

        admissions = admissions_of(self._llm)
        if admissions is not None:
            admissions.unload(name)

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        """See `Engine.pin_adapter`; what vLLM has pinned stays so until it is unloaded."""
        return self._in_loop(self._pin(name, pinned))

    async def _pin(self, name: str, pinned: bool) -> AdapterStatus:
        from roadie.vllm.frontend import load_async

        if name not in self._requests:
            raise UnknownAdapter(f"got adapter {name!r}, which is not loaded; wanted one that is")
        if pinned:
            admitted = await load_async(self._llm, self._requests[name])
            await self._llm.pin_lora(admitted.lora_int_id)
            self._pinned.add(name)
        else:
            self._pinned.discard(name)
        return self._status(name)

    def _status(self, name: str) -> AdapterStatus:
        counts = self._by_adapter.get(name, Counter())
        return AdapterStatus(
            name,
            AdapterState.RESIDENT,
            path=self._requests[name].lora_path,
            is_pinned=name in self._pinned,
            num_running=sum(request.adapter == name for request, _ in list(self._live.values())),
            num_requests=counts["requests"],
            num_tokens=counts["tokens"],
        )

    def adapters(self) -> tuple[AdapterStatus, ...]:
        """See `Engine.adapters`: those that were loaded."""
        return tuple(self._status(name) for name in sorted(self._requests))

    def has_adapter(self, name: str) -> bool:
        """See `Engine.has_adapter`."""
        return name in self._requests

    def own_chat(self, name: str) -> OwnChat | None:
        """See `Engine.own_chat`: copies of adapters hold their config and weights alone."""
        return None

    def left_out(self) -> tuple[LeftOut, ...]:
        """See `Engine.left_out`: what there is comes from the directory."""
        return ()

    def statistics(self) -> Statistics:
        """See `Engine.statistics`; what vLLM alone knows (blocks, steps) is 0, and in its own metrics."""
        zero = dict.fromkeys(Statistics.__dataclass_fields__, 0)
        known = {
            "num_running": min(len(self._live), self.limits.max_running),
            "num_queued": max(0, len(self._live) - self.limits.max_running),
            "num_slots": self.limits.num_slots,
            "num_resident": min(len(self._requests), self.limits.num_slots),
            "num_requests": self._counts["requests"],
            "num_refused": self._counts["refused"],
            "num_generated_tokens": self._counts["tokens"],
            "num_loads": self._counts["loads"],
            "queued_by_tenant": {},
            "running_by_tenant": {},
        }
        return Statistics(**{**zero, **known})  # type: ignore[arg-type]


def sampling_params(rules: Sampling) -> Any:
    """vLLM's words for how tokens are chosen; outputs are what is new."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=rules.max_tokens,
        temperature=rules.temperature,
        top_p=rules.top_p or 1e-9,
        top_k=rules.top_k,
        min_p=rules.min_p,
        repetition_penalty=rules.repetition_penalty,
        min_tokens=rules.min_tokens,
        skip_special_tokens=rules.skip_special_tokens,
        seed=rules.seed,
        stop=list(rules.stop),
        include_stop_str_in_output=rules.include_stop,
        stop_token_ids=list(rules.stop_token_ids),
        ignore_eos=rules.ignore_eos,
        presence_penalty=rules.presence_penalty,
        frequency_penalty=rules.frequency_penalty,
        logit_bias=dict(rules.logit_bias) or None,
        logprobs=rules.logprobs,
        output_kind=RequestOutputKind.DELTA,
    )


def logprobs_of(part: Any, num_top: int | None) -> tuple[TokenLogprob, ...]:
    """Of the tokens of a part; none where they were not asked for. num_top: alternatives to report, best first."""
    if num_top is None or part.logprobs is None:
        return ()
    return tuple(
        TokenLogprob(token, by_id[token].logprob, _top(by_id, num_top))
        for token, by_id in zip(part.token_ids, part.logprobs, strict=True)
    )


def _top(by_id: Mapping[int, Any], num_top: int) -> tuple[tuple[int, float], ...]:
    """vLLM lists the token that was chosen, too, wherever it ranks."""
    found = sorted((entry.rank, token, entry.logprob) for token, entry in by_id.items())
    return tuple((token, logprob) for rank, token, logprob in found if rank <= num_top)
