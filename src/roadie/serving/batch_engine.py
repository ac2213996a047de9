"""`ContinuousBatchingEngine`: the engine of a server on one machine, on transformers' continuous batching and the bank.

One thread runs the loop:

    settle    cancelled requests leave; others start: whose turn it is (`fairness`), whose adapter is in a slot (`residency`)
    step      one forward over whoever runs (`continuous_batching`), a token for each (`sampling`), its text (`text`);
              logprobs of the prompts that are to be scored (`scoring`)
    deliver   outputs, to whoever submitted the requests

Another thread reads adapters and puts them into slots that nobody reads, so that the loop never waits for a file. Callers only
touch the queue. Everything shared is under one condition, `_changed`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from roadie.adapter import Adapter
from roadie.bank import AdapterBank
from roadie.engine import TrainingEngine, TrainingSettings
from roadie.errors import ConfigError, EngineFailed, QueueFull, ServingError, ShuttingDown
from roadie.serving.active import ActiveRequest
from roadie.serving.belongings import Base, OwnChat
from roadie.serving.beside import TrainingBeside, give, required
from roadie.serving.continuous_batching import ContinuousBatch, Packed, check_contract
from roadie.serving.engine import (
    AdapterStatus,
    EngineLimits,
    EngineSettings,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Statistics,
    Unload,
)
from roadie.serving.fairness import FairQueue
from roadie.serving.grammars import Constraint, Grammars
from roadie.serving.leases import Callbacks, Key, Totals
from roadie.serving.loader import IDLE_AFTER_S
from roadie.serving.places import LeftOut, check_served_name
from roadie.serving.registry import Registry
from roadie.serving.residency import Residency
from roadie.serving.sampling import choose
from roadie.serving.unloads import Unloads
from roadie.serving.validation import check_request, check_room, eos_ids_of, key_of, last_layer_sites, limits_of

_log = logging.getLogger("roadie")
_Delivery = tuple[ActiveRequest, Output]


class ContinuousBatchingEngine:
    """An `Engine`. model: any that transformers' continuous batching takes; tokenizer: None for tokens without text.

    Between `start` and `stop` nobody else may use the model. names: what the model is called, beside its own name or path; an
    adapter that was made for another is said to be. training: where tenants train beside the requests, in the same loop; the
    model's parameters are frozen then.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        registry: Registry,
        settings: EngineSettings | None = None,
        names: Sequence[str] = (),
        training: TrainingSettings | None = None,
    ) -> None:
        self.settings = settings or EngineSettings()
        check_contract(self.settings.allow_unknown_version)
        self._model, self._tokenizer, self._registry = model, tokenizer, registry
        self._limits = limits_of(model, self.settings)
        self._eos_ids = eos_ids_of(model, tokenizer)
        self._grammars = Grammars(tokenizer, self._limits.vocabulary_size)
        self._base = Base.of(model, tokenizer, names)
        self._changed = threading.Condition(threading.RLock())
        self._waiting: FairQueue[ActiveRequest] = FairQueue(self.settings.tenant_weights)
        self._active: dict[str, ActiveRequest] = {}
        self._running: dict[str, ActiveRequest] = {}
        self._wanted: Counter[Key] = Counter()  # of the requests that wait
        self._to_cancel: list[ActiveRequest] = []
        self._totals = Totals()
        self._by_adapter: dict[str, Counter[str]] = {}
        self._mean_run_s = 1.0
        self._stepped_s = -IDLE_AFTER_S
        self._outputs: list[_Delivery] = []
        self._is_taking = self._is_stopping = False
        self._has_news = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._beside: TrainingBeside | None = None
        if training is not None:
            self._beside = TrainingBeside(model, training, self.settings.turns, self._changed, self._notify)

    # Life.

    def start(self) -> None:
        """See `Engine.start`."""
        if self._thread is not None:
            raise ServingError("got an engine that was started before; wanted a new one")
        slots, dtype = self.settings.num_slots, getattr(torch, self.settings.table_dtype)
        self._bank = AdapterBank(self._model, slots, dtype=dtype, wait_s=0.0, check_name=check_served_name)
        try:
            self._batch = ContinuousBatch(self._model, self._bank, self.settings, self._choose, self._score)
        except BaseException:
            self._bank.close()
            raise
        self._residency = Residency(
            self._bank,
            self._registry,
            self._changed,
            Callbacks(
                self._remaining_tokens, self._is_wanted, self._notify, self._note_layers, self._num_running_lately
            ),
            self._base,
        )
        self._unloads = Unloads(self._residency, self.cancel)
        self._last_layer = last_layer_sites(self._model)
        self._residency.look_around()
        self._residency.bring_pinned()
        self._is_taking = True
        self._thread = threading.Thread(target=self._run, name="roadie-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """See `Engine.stop`."""
        with self._changed:
            self._is_taking, self._is_stopping = False, True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def drain(self, timeout_s: float | None = None) -> bool:
        """See `Engine.drain`."""
        with self._changed:
            self._is_taking = False
            return self._changed.wait_for(lambda: not self._active, timeout_s)

    @property
    def is_ready(self) -> bool:
        """See `Engine.is_ready`."""
        return self._is_taking

    @property
    def limits(self) -> EngineLimits:
        """See `Engine.limits`."""
        return self._limits

    # Requests.

    def prepare(self, constraint: Constraint) -> None:
        """See `Engine.prepare`."""
        self._grammars.compile(constraint)

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """See `Engine.submit`."""
        key = key_of(request, self._limits)
        check_request(request, self._limits, self._tokenizer is not None)
        progress = self._grammars.begin(request.constraint)
        active = ActiveRequest(request, key, on_output, self._tokenizer, self._eos_ids, progress)
        with self._changed:
            self._check_taking()
            if request.request_id in self._active:
                raise ConfigError(f"got request id {request.request_id!r}, which is active; wanted one of its own")
            self._residency.require(key)
            self._check_room(request.tenant)
            self._active[active.id] = active
            self._waiting.push(active)
            self._wanted[key] += 1
            self._totals.num_requests += 1
            for name in active.names:
                self._by_adapter.setdefault(name, Counter())["requests"] += 1
            self._notify()

    def cancel(self, request_id: str) -> bool:
        """See `Engine.cancel`."""
        with self._changed:
            active = self._active.get(request_id)
            if active is None or active.is_cancelled:
                return False
            active.is_cancelled = True
            self._to_cancel.append(active)
            self._notify()
            return True

    def _notify(self) -> None:
        self._has_news = True
        self._changed.notify_all()

    def _check_started(self) -> None:
        if self._thread is None:
            raise ShuttingDown("got an engine that was not started; wanted one that runs; call start")

    def _check_taking(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed ({self._failure}); start the server again")
        if not self._is_taking:
            raise ShuttingDown("got a request for an engine that takes none; try another server, or later")

    def _check_room(self, tenant: str) -> None:
        try:
            check_room(len(self._waiting), self._waiting.num_of(tenant), tenant, self._limits, self._mean_run_s)
        except QueueFull:
            self._totals.num_refused += 1
            raise

    # Training.

    @property
    def training(self) -> TrainingEngine:
        """Where tenants train, in this engine's loop; raises `ServingError` for an engine without."""
        return required(self._beside).engine

    def publish(self, tenant: str, name: str | None = None) -> Future[AdapterStatus]:
        """Let requests have the tenant's weights by this name (its own, where none is given), when it is its turn.

        They are in no folder, and there until they are unloaded or the engine stops. Requests that run keep what they
        started with. The future raises `ConfigError` for a name that an adapter with files has.
        """
        self._check_started()
        return required(self._beside).publish(tenant, name or tenant, self._residency, self._bank)

    def give_adapter(self, name: str, adapter: Adapter) -> Future[AdapterStatus]:
        """As `publish`, of an adapter that nobody trains here."""
        self._check_started()
        return give(name, adapter, self._residency, self._bank)

    # Adapters.

    def adapters(self) -> tuple[AdapterStatus, ...]:
        """See `Engine.adapters`."""
        self._check_started()
        statuses = self._residency.statuses()
        with self._changed:
            running = Counter(name for active in self._running.values() for name in active.names)
            queued = Counter(name for active in self._waiting for name in active.names)
            return tuple(self._counted(status, running, queued) for status in statuses)

    def has_adapter(self, name: str) -> bool:
        """See `Engine.has_adapter`."""
        self._check_started()
        return name in self._residency

    def own_chat(self, name: str) -> OwnChat | None:
        """See `Engine.own_chat`."""
        self._check_started()
        return self._residency.belongings(name).chat

    def left_out(self) -> tuple[LeftOut, ...]:
        """See `Engine.left_out`."""
        return self._registry.left_out()

    def _counted(self, status: AdapterStatus, running: Mapping[str, int], queued: Mapping[str, int]) -> AdapterStatus:
        counts = self._by_adapter.get(status.name, Counter())
        return replace(
            status,
            num_running=running.get(status.name, 0),
            num_queued=queued.get(status.name, 0),
            num_requests=counts["requests"],
            num_tokens=counts["tokens"],
        )

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        """See `Engine.load_adapter`."""
        self._check_started()
        return self._residency.run(lambda: self._residency.load(name, path, not replace))

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        """See `Engine.pin_adapter`."""
        self._check_started()
        return self._residency.run(lambda: self._residency.pin(name, pinned))

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        """See `Engine.unload_adapter`."""
        self._check_started()
        with self._changed:
            return self._unloads.begin(name, how, self._active)

    def statistics(self) -> Statistics:
        """See `Engine.statistics`."""
        self._check_started()
        with self._changed:
            counts, blocks_free = self._residency.counts, self._batch.num_blocks_free
            return Statistics(
                num_running=len(self._running),
                num_queued=len(self._waiting),
                num_slots=self._limits.num_slots,
                num_slots_leased=self._residency.num_leased,
                num_resident=self._residency.num_resident,
                num_blocks=self._batch.num_blocks,
                num_blocks_free=blocks_free,
                **vars(self._totals),
                **(self._beside.figures if self._beside else {}),
                **vars(counts),
                queued_by_tenant=self._waiting.by_tenant(),
                running_by_tenant=dict(Counter(active.tenant for active in self._running.values())),
            )

    # The loop.

    def _run(self) -> None:
        try:
            while self._settle():
                if not self._train() and self._running:
                    self._step()
                self._deliver()
        except Exception as error:
            _log.exception("a step of the engine failed")
            self._failure = error
        finally:
            self._end()

    def _train(self) -> bool:
        """Where it is training's turn, let it have one."""
        return self._beside is not None and self._beside.work(self._active, bool(self._running), self._batch.lent)

    def _settle(self) -> bool:
        """Who leaves and who starts; waits while there is nothing to do. Whether to go on."""
        with self._changed:
            while not (self._running or self._has_news or self._is_stopping):
                pause_s = None if self._beside is None else self._beside.pause_s
                if pause_s == 0:
                    break
                self._changed.wait(pause_s)
            self._has_news = False
            if self._is_stopping:
                return False
            for active in self._to_cancel:
                if active.id in self._active:
                    self._leave(active, active.last(FinishReason.CANCELLED))
            self._to_cancel.clear()
            self._fail_what_cannot_start()
            self._start_whose_turn_it_is()
            return True

    def _fail_what_cannot_start(self) -> None:
        failed = [key for key in self._wanted if self._residency.failure(key) is not None]
        for key in failed:
            error = self._residency.failure(key)
            for active in [active for active in self._waiting if active.key == key]:
                self._leave(active, active.last(FinishReason.FAILED, error))

    def _start_whose_turn_it_is(self) -> None:
        """Start requests while there is room; those whose adapter has to be brought are passed by until it is there."""
        while self._waiting and len(self._running) < self._limits.max_running:
            started = next((active for active in self._candidates() if self._start(active)), None)
            if started is None:
                return

    def _candidates(self) -> list[ActiveRequest]:
        running = Counter(active.tenant for active in self._running.values())
        turn = self._waiting.in_turn(lambda tenant: running[tenant] < self._limits.max_running_per_tenant)
        return [active for active, _ in zip(turn, range(2 * self._limits.max_running), strict=False)]

    def _start(self, active: ActiveRequest) -> bool:
        lease = self._residency.lease(active.key)
        if lease is None:
            return False
        self._no_longer_waiting(active)
        self._waiting.charge(active.tenant, active.flow, active.most_tokens)
        active.start(lease)
        self._running[active.id] = active
        self._batch.add(active.id, active.scorer.read_ids, Packed(lease.slot, lease.salt, active.scorer.places))
        return True

    def _no_longer_waiting(self, active: ActiveRequest) -> None:
        self._waiting.remove(active)
        self._wanted[active.key] -= 1
        if self._wanted[active.key] <= 0:
            del self._wanted[active.key]
            self._residency.not_wanted(active.key)

    def _step(self) -> None:
        begin = time.perf_counter()
        self._batch.step()
        with self._changed:
            self._stepped_s = time.monotonic()
            self._totals.num_steps += 1
            seconds = time.perf_counter() - begin
            self._totals.seconds_computing += seconds
            ended = [active for active, output in self._outputs if output.finish is not None]
            for active in [active for active in ended if active.id in self._running]:
                self._leave(active, None)
        if self._beside:
            self._beside.sampled(seconds)

    def _score(self, request_id: str, place: int, logits: Tensor) -> None:
        """Logits of a prompt; called within a step, before `_choose`."""
        self._running[request_id].scorer.take(place, logits)

    def _choose(self, ids: Sequence[str], logits: Tensor) -> list[int]:
        """The next tokens, and what to tell of them; called within a step."""
        rows = [self._running[request_id] for request_id in ids]
        chosen = choose(logits, [active.sampler for active in rows])
        for active, token in zip(rows, chosen, strict=True):
            if active.num_generated == 0:
                self._first_token(active)
            output = active.advance(token)
            self._outputs.append((active, output))
            self._totals.num_generated_tokens += len(output.token_ids)
        return [token.token_id for token in chosen]

    def _first_token(self, active: ActiveRequest) -> None:
        active.num_cached = self._batch.cached_tokens(active.id)
        self._totals.num_prompt_tokens += len(active.request.prompt_ids)
        self._totals.num_cached_prompt_tokens += active.num_cached

    def _leave(self, active: ActiveRequest, output: Output | None) -> None:
        """A request ends: what it held is given back, and what it did not generate."""
        if active.id in self._running:
            del self._running[active.id]
            self._batch.remove(active.id)
            self._waiting.charge(active.tenant, active.flow, -active.num_remaining)
            self._mean_run_s += 0.05 * (time.monotonic() - active.started_s - self._mean_run_s)
            assert active.lease is not None
            lease, active.lease = active.lease, None
            self._residency.release(lease)
        else:
            self._no_longer_waiting(active)
        del self._active[active.id]
        for name in active.names:
            self._by_adapter.setdefault(name, Counter())["tokens"] += active.num_generated
        self._totals.count_end(active.finish)
        if output is not None:
            self._outputs.append((active, output))
        self._unloads.finish(self._active)
        self._notify()  # whoever waits may have been passed by for what this one held

    def _deliver(self) -> None:
        outputs, self._outputs = self._outputs, []
        for active, output in outputs:
            try:
                active.on_output(output)
            except Exception:
                _log.exception("whoever submitted a request failed to take an output; it is cancelled")
                self.cancel(active.id)

    def _end(self) -> None:
        """The loop is over: whoever is active fails, and the model is as it was."""
        reason: ServingError = ShuttingDown("the engine has stopped")
        if self._failure is not None:
            reason = EngineFailed(f"a step of the engine failed: {self._failure}")
        with self._changed:
            self._is_taking = False
            self._outputs = [
                (active, output)
                for active, output in self._outputs
                if output.finish is None or self._active.get(active.id) is not active
            ]
            for active in list(self._active.values()):
                self._fail(active, reason)
            unloads = self._unloads.take_all()
        self._deliver()
        if self._beside:
            self._beside.engine.close()
        self._residency.close()
        for done in unloads:
            done.set_exception(reason)
        self._batch.close()
        self._bank.close()
        with self._changed:
            self._changed.notify_all()

    def _fail(self, active: ActiveRequest, reason: Exception) -> None:
        last = active.last(FinishReason.FAILED, reason)
        try:
            self._leave(active, last)
        except Exception:  # a step has failed, and the batch may be broken; whoever waits is to hear of it
            self._active.pop(active.id, None)
            self._outputs.append((active, last))

    # What the parts ask.

    def _remaining_tokens(self, key: Key) -> int:
        return max((active.num_remaining for active in self._running.values() if active.key == key), default=0)

    def _is_wanted(self, key: Key) -> bool:
        return key in self._wanted

    def _num_running_lately(self) -> int:
        """Requests that run; at least one until the engine has been idle for a while."""
        is_idle = time.monotonic() - self._stepped_s > IDLE_AFTER_S
        return max(len(self._running), not is_idle)

    def _note_layers(self, paths: Iterable[str]) -> None:
        if not self._last_layer.isdisjoint(paths):
            self._batch.keep_all_logits()
