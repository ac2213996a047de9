"""Models in training: what is asked of each takes effect in the order of seq_id, and again after a restart.

    POST -> a row of `futures` -> in its turn to the engine -> the result, into the row
                                       every `KEEP_EVERY_S`, where no gradients wait: the state into a folder, the rows let go

A request that is ahead of its turn waits for those before it; one that comes again is the same future. So a run goes on, however
the process ended: it begins with the state that was kept last, and what was asked since is done again, in the same order.
Saving is not done again: what is saved stays. A run that nobody has asked for a while gives its place in the engine up.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from tinker import types

from roadie.engine import AdamSettings, ForwardResult, StepResult, TenantState
from roadie.errors import AdapterError, ConfigError, EngineFailed, QueueFull, RoadieError, ShuttingDown
from roadie.serving import ContinuousBatchingEngine
from roadie.train_service.database import Write
from roadie.train_service.progress import Progress
from roadie.train_service.tinker_api import records, wire
from roadie.train_service.tinker_api.checkpoints import Checkpoints, check_ttl
from roadie.train_service.tinker_api.futures import CREATE, PROTOBUF, Asked, Futures, Result, failure, json_result
from roadie.train_service.tinker_api.records import EPHEMERAL, INFLIGHT, Checkpoint, Records, Sampler
from roadie.train_service.tinker_api.samplers import Samplers
from roadie.train_service.tinker_api.store import Store
from roadie.train_service.tinker_api.tasks import Tasks

_log = logging.getLogger("roadie.train_service")
KEEP_EVERY_S = 10.0
IDLE_S = 1800.0
_numbers = count(1)
MAX_AHEAD = 1024
"""Requests that may be ahead of their turn."""
REFUSED_LOSSES = {
    "stable_reinforce": "needs what a sampler records of its own precision, which this server does not",
    "custom": "is a loss that the server would trace; use forward_backward_custom with a function, which the client computes",
}


@dataclass(frozen=True, eq=False)
class Ground:
    """What runs stand on."""

    engine: ContinuousBatchingEngine
    futures: Futures
    records: Records
    store: Store
    tasks: Tasks
    checkpoints: Checkpoints
    samplers: Samplers
    progress: Progress


class RunLeft(Exception):
    """The run is no longer in the engine; it may be brought again."""


class Run:
    """One model. record: as it is when it becomes active; created: of the engine."""

    def __init__(self, ground: Ground, record: records.Run, source: Any) -> None:
        self._ground, self.id, self.tenant, self._record = ground, record.id, record.tenant, record
        self._name = _new_name(record.id)
        self._next_seq = record.kept_seq + 1
        self._ahead: dict[int, Asked] = {}
        self._lock = threading.RLock()
        self._asked_s = time.monotonic()
        self._has_gradients = self._has_changed = self._is_keeping = self._is_over = False
        self.kept, self._kept_s, self.kept_seq = record.kept, time.monotonic(), record.kept_seq
        self._kinds: dict[str, Callable[[Asked], None]] = {
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save,
            "save_weights_for_sampler": self._save_for_sampler,
            "save_weights_external": self._save_external,
            "load_weights": self._load,
        }
        created = ground.engine.training.create(self._name, source, owner=record.tenant)
        ground.progress.begin(self.tenant, self.id, "training_run")
        if ground.futures.is_waiting(f"{self.id}:0"):
            answer = {"model_id": self.id, "type": "create_model" if record.kept is None else "load_weights"}
            self._when_done(f"{self.id}:0", created, lambda _: json_result(answer))
        for asked in ground.futures.of_owner(self.id, record.kept_seq):
            self._ahead[asked.seq] = asked
        self.pump()

    def ask(self, seq: int | None, kind: str, body: bytes) -> str:
        """Take a request; the id of its future. Raises `ApiError`, `ConfigError`, `QueueFull` or `StateNotWritten`."""
        if seq is None or not 1 <= seq < 2**53:
            raise ConfigError(f"got seq_id={seq}; wanted a number from 1, the next one of this model")
        asked = Asked(f"{self.id}:{seq}", self.tenant, self.id, seq, kind, body)
        with self._lock:
            if self._is_over:
                raise RunLeft
            self._asked_s = time.monotonic()
            if seq >= self._next_seq and seq not in self._ahead:
                if len(self._ahead) >= MAX_AHEAD:
                    raise QueueFull(
                        f"{len(self._ahead)} requests of this model wait for their turn; send those before", 1.0
                    )
                self._ground.futures.open(asked)
                self._ahead[seq] = asked
                self.pump()
        return asked.id

    def pump(self) -> None:
        """Give the engine what is next in turn."""
        with self._lock:
            while not self._is_over and self._next_seq in self._ahead:
                asked = self._ahead[self._next_seq]
                try:
                    self._kinds[asked.kind](asked)
                except (QueueFull, ShuttingDown):  # later, when something of it is done; after the restart
                    return
                except Exception as error:
                    if not isinstance(error, RoadieError):
                        _log.exception("a request of a run failed")
                    self._finish(asked, failure(error))
                del self._ahead[self._next_seq]
                self._next_seq += 1
            self._keep_if_due()

    # Kinds of requests; each raises before it has changed anything.

    def _forward_backward(self, asked: Asked) -> None:
        request = wire.request_of(asked.body)
        if request.loss_fn in REFUSED_LOSSES:
            raise ConfigError(f"got loss_fn={request.loss_fn!r}, which {REFUSED_LOSSES[request.loss_fn]}")
        if request.forward_only and asked.is_done:
            return
        training = self._ground.engine.training
        ask = training.forward if request.forward_only else training.forward_backward
        rows, (settings, reward) = wire.rows_of(request), wire.loss_settings(request)
        future = ask(self._name, rows, request.loss_fn, settings, all_logprobs=True)
        self._has_gradients = self._has_gradients or not request.forward_only
        num_tokens = sum(len(row.tokens) for row in rows)

        def answer(result: ForwardResult) -> Result:
            if not request.forward_only:
                self._ground.progress.learnt(self.id, num_tokens, result.loss, reward)
            return Result(PROTOBUF, wire.forward_bytes(result))

        self._answer(asked, future, answer)

    def _optim_step(self, asked: Asked) -> None:
        params = types.OptimStepRequest.model_validate_json(asked.body).optim_params
        if not isinstance(params, types.AdamParams):
            raise ConfigError(f"got the optimiser {params.type!r}; wanted adamw, with AdamParams")
        settings = AdamSettings(
            params.learning_rate, params.weight_decay, params.grad_clip_norm, params.beta1, params.beta2, params.eps
        )
        future = self._ground.engine.training.optim_step(self._name, settings)
        self._has_gradients, self._has_changed = False, True

        def answer(result: StepResult) -> Result:
            self._ground.progress.stepped(self.id, result.step)
            return json_result({"metrics": {"optim/step": result.step, "optim/gradient_norm": result.gradient_norm}})

        self._answer(asked, future, answer)

    def _save(self, asked: Asked) -> None:
        request = types.SaveWeightsRequest.model_validate_json(asked.body)
        self._save_named(asked, "training", request, overwrite=request.overwrite)

    def _save_external(self, asked: Asked) -> None:
        request = types.SaveWeightsExternalRequest.model_validate_json(asked.body)
        if request.age_encryption_recipients:
            raise ConfigError("got age_encryption_recipients; this server does not encrypt; leave them out")
        self._save_named(asked, "external", request)

    def _save_for_sampler(self, asked: Asked) -> None:
        request = types.SaveWeightsForSamplerRequest.model_validate_json(asked.body)
        if request.path is None and request.sampling_session_seq_id is not None:
            self._save_for_session(asked, request)
        else:
            self._save_named(asked, "sampler", request)

    def _save_for_session(self, asked: Asked, request: types.SaveWeightsForSamplerRequest) -> None:
        """Weights that are sampled from at once, by one session; in flight: all sessions of it have the newest."""
        session, base_model = self._record.session, self._record.base_model
        sampler = f"{session}:sample:{request.sampling_session_seq_id}"
        kind, name = (INFLIGHT, INFLIGHT) if request.kind == "inflight" else (EPHEMERAL, sampler)
        if asked.is_done:
            return
        checkpoint = self._checkpoint(self._ground.checkpoints.id_of(self.id, kind, name), kind, name)
        published = self._ground.samplers.publish(self._name, self.tenant, checkpoint.id)

        def also(write: Write) -> None:
            self._ground.records.put(
                Sampler(sampler, self.tenant, session, time.time(), base_model, checkpoint.id), write
            )

        def save(state: TenantState) -> Result:
            self._ground.checkpoints.add(checkpoint, state, also, overwrite=True)
            published.result()
            return json_result({"sampling_session_id": sampler, "type": asked.kind})

        self._answer(asked, self._ground.engine.training.state(self._name), save)

    def _save_named(self, asked: Asked, kind: str, request: Any, *, overwrite: bool = False) -> None:
        """A checkpoint of the state in this request's turn; not again after a restart, and so written with the answer."""
        if asked.is_done:
            return
        name, metadata = request.path or f"{asked.seq:06d}", getattr(request, "user_metadata", None)
        checkpoint = self._checkpoint(records.new_id(), kind, name, request.ttl_seconds, metadata)
        result = json_result({"path": checkpoint.path, "type": asked.kind})

        def save(state: TenantState) -> Result:
            also = partial(self._ground.futures.write, asked.id, result)
            self._ground.checkpoints.add(checkpoint, state, also, overwrite=overwrite)
            return result

        self._answer(asked, self._ground.engine.training.state(self._name), save)

    def _checkpoint(
        self, id: str, kind: str, name: str, ttl_s: int | None = None, metadata: dict[str, str] | None = None
    ) -> Checkpoint:
        check_ttl(ttl_s)
        now, own = time.time(), self._record
        expires = None if ttl_s is None else now + ttl_s
        words = records.dumped(metadata)
        return Checkpoint(id, own.tenant, own.id, kind, name, "", 0, now, expires, now, own.lora, own.base_model, words)

    def _load(self, asked: Asked) -> None:
        """Begin anew with the weights of a checkpoint."""
        request = types.LoadWeightsRequest.model_validate_json(asked.body)
        if asked.seq != 1:
            raise ConfigError(
                f"got load_weights as request {asked.seq} of this model; wanted it as the first one; make a new model"
            )
        ground = self._ground
        kept = ground.checkpoints.copy(request.path, self.tenant, with_optimiser=request.optimizer)
        before, self._name = self._name, _new_name(self.id)
        created = ground.engine.training.create(self._name, ground.store.load_state(kept), owner=self.tenant)
        ground.engine.training.remove(before)

        result = json_result({"path": request.path, "model_id": self.id, "type": "load_weights"})

        def answer(_: None) -> Result:
            self._keep(asked.seq, kept, partial(ground.futures.write, asked.id, result))
            return result

        self._answer(asked, created, answer)

    # What becomes of them, in the thread of `tasks`.

    def _answer(self, asked: Asked, future: Future[Any], make: Callable[[Any], Result]) -> None:
        self._when_done(None if asked.is_done else asked.id, future, make)

    def _finish(self, asked: Asked, result: Result) -> None:
        if not asked.is_done:
            self._ground.tasks.submit(self._ground.futures.finish, asked.id, result)

    def _when_done(self, id: str | None, future: Future[Any], make: Callable[[Any], Result]) -> None:
        future.add_done_callback(lambda done: self._ground.tasks.submit(self._settle, id, done, make))

    def _settle(self, id: str | None, done: Future[Any], make: Callable[[Any], Result]) -> None:
        try:
            result = make(done.result())
        except (ShuttingDown, EngineFailed, CancelledError):  # done again after the restart
            return
        except Exception as error:
            if not isinstance(error, RoadieError):
                _log.exception("a request of a run failed")
            result = failure(error)
        if id is not None:
            self._ground.futures.finish(id, result)
        self.pump()

    # What a run goes on from.

    def _keep_if_due(self) -> None:
        if time.monotonic() - self._kept_s >= KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Write down what to go on from, unless gradients wait, which are in no state; in its turn."""
        with self._lock:
            seq = self._next_seq - 1
            if self._has_gradients or self._is_keeping or self._is_over or seq == self.kept_seq:
                return
            training, self._is_keeping, self._kept_s = self._ground.engine.training, True, time.monotonic()
            ask = training.state if self._has_changed else partial(training.when_its_turn, task=lambda: None)
            try:
                future = ask(self._name)
            except RoadieError:
                self._is_keeping = False
                return
            self._has_changed = False
            future.add_done_callback(lambda done: self._ground.tasks.submit(self._keep_state, seq, done))

    def _keep_state(self, seq: int, done: Future[TenantState | None]) -> None:
        try:
            state = done.result()
            self._keep(seq, self.kept if state is None else self._ground.store.save_state(state))
        except (RoadieError, CancelledError) as error:  # what was asked is still there, and so is what was kept before
            self._has_changed = True
            _log.warning("the state of %s was not kept: %s", self.id, error)
        finally:
            self._is_keeping = False

    def _keep(self, seq: int, folder: str | None, also: Callable[[Write], None] = lambda _: None) -> None:
        self._ground.records.keep(self.id, seq, folder, also)
        before, self.kept, self.kept_seq = self.kept, folder, seq
        if before != folder:
            self._ground.store.remove(before)

    def end(self) -> None:
        """Nothing more is taken, the engine forgets it, and what waits for requests that have not come is done no more."""
        with self._lock:
            self._is_over = True
            for asked in self._ahead.values():
                self._finish(
                    asked, failure(ConfigError("got no request before this one in time; wanted all of them; ask again"))
                )
            self._ahead.clear()
            self._ground.tasks.submit(self._ground.futures.let_go, self.id, self._next_seq - 1)
            self._ground.engine.training.remove(self._name)
            self._ground.progress.stands(self.id, "idle")

    def leave(self) -> bool:
        """Give the place in the engine up, where nobody has asked for a while and all is kept; whether it has."""
        with self._lock:
            is_idle = time.monotonic() - self._asked_s > IDLE_S and not self._is_keeping
            if is_idle and self.kept_seq == self._next_seq - 1 and self._next_seq not in self._ahead:
                self.end()
            return self._is_over


def _new_name(id: str) -> str:
    """Of a tenant in the engine: the one before may still be leaving."""
    return f"{id}#{next(_numbers)}"


class Runs:
    """All that is in training; others are brought when they are asked for."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._active: dict[str, Run] = {}
        self._lock, self._creating = threading.Lock(), threading.Lock()

    def start(self) -> None:
        """Go on with those of which something waits."""
        for id in dict.fromkeys(asked.owner for asked in self._ground.futures.waiting(samples=False)):
            record = self._ground.records.find(records.Run, id)
            if record is not None and not record.is_over:
                try:
                    self.active(record)
                except RoadieError as error:
                    _log.warning("%s does not go on: %s", id, error)
        for asked in self._ground.futures.waiting(samples=False):
            run = self._active.get(asked.owner)
            if run is None or (asked.seq <= run.kept_seq and asked.kind != CREATE):
                lost = ConfigError(
                    "got a restart after this was done and before its result was written; its effect is there"
                )
                self._ground.futures.finish(asked.id, failure(lost))

    def create(self, record: records.Run) -> str:
        """Begin a run, or find it where it was begun before; the id of its future. Raises `ConfigError`, `QueueFull`."""
        ground, id = self._ground, f"{record.id}:0"
        with self._creating:
            if ground.records.find(records.Run, record.id) is None:
                asked = Asked(id, record.tenant, record.id, 0, CREATE, b"{}")
                with ground.records.transaction() as write:
                    ground.records.put(record, write)
                    ground.futures.open(asked, write)
            try:
                self.of(record.id, record.tenant)
            except (ConfigError, AdapterError):
                ground.records.delete(records.Run, record.id)
                ground.futures.drop(id)
                raise
        return id

    def of(self, id: str, tenant: str) -> Run:
        """The run of this id; raises `ApiError` (404) where this tenant has none that takes requests."""
        record = self._ground.records.require(records.Run, id, tenant)
        if record.is_over:
            raise records.unknown("training run", id)
        return self.active(record)

    def active(self, record: records.Run) -> Run:
        """The run, brought into the engine where it is not there."""
        with self._lock:
            found = self._active.get(record.id)
            if found is None:
                config = json.loads(record.config)
                source = config if record.kept is None else self._ground.store.load_state(record.kept)
                found = self._active[record.id] = Run(self._ground, record, source)
            return found

    def unload(self, id: str, tenant: str) -> str:
        """End a run: its checkpoints stay, the run does not go on; the id of the future. Raises as `of` does."""
        ground, future = self._ground, f"{id}:end"
        if ground.records.require(records.Run, id, tenant).is_over and ground.futures.exists(future):
            return future
        run, result = self.of(id, tenant), json_result({"model_id": id, "type": "unload_model"})
        with self._lock:
            self._active.pop(id, None)
        run.end()

        def answer(write: Write) -> None:
            ground.futures.open(Asked(future, tenant, id, 2**53, "unload_model", b""), write)
            ground.futures.write(future, result, write)

        ground.records.change(records.Run, id, answer, is_over=1, kept=None)
        ground.futures.finish(future, result)
        ground.progress.stands(id, "unloaded")
        ground.store.remove(run.kept)
        ground.futures.let_go(id)
        return future

    def ask(self, id: str, tenant: str, seq: int | None, kind: str, body: bytes) -> str:
        """See `Run.ask`; raises as `of` does, too."""
        while True:
            with suppress(RunLeft):
                return self.of(id, tenant).ask(seq, kind, body)

    def keep(self) -> None:
        """Let all keep their states that have changed, and go where nobody has asked for them for a while."""
        for run in list(self._active.values()):
            run.keep()
            with self._lock:
                if run.leave():
                    self._active.pop(run.id, None)
