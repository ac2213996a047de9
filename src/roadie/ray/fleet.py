"""All replicas as one engine: what the HTTP side of `roadie serve` runs over, unchanged.

    submit      checks what can be checked here, and sends the request to a replica that `routing` chooses
    retry       a replica that dies, or whose engine does, loses what it was doing; it is asked of another one, unless the caller
                has seen a part of the answer
    adapters    by the directory

All methods but the properties are called on the event loop of the front.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException

from roadie.errors import (
    AdapterBusy,
    ConfigError,
    EngineFailed,
    QueueFull,
    RoadieError,
    ServingError,
    ShuttingDown,
    UnknownAdapter,
)
from roadie.ray.catalogue import Entry
from roadie.ray.membership import Orders, Outcome, Overview, Task
from roadie.ray.messages import ReplicaRequest
from roadie.ray.overview import summed
from roadie.ray.routing import names_of
from roadie.serving.belongings import OwnChat
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    EngineLimits,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Statistics,
    Unload,
)
from roadie.serving.grammars import Constraint
from roadie.serving.http.failures import unknown_model
from roadie.serving.places import LeftOut
from roadie.serving.validation import check_request, key_of

_log = logging.getLogger("roadie")
MAX_ATTEMPTS = 5
BACKOFF_S = 0.1


class ReplicaLost(EngineFailed):
    """A replica died, or its engine did, while it had a request."""


@dataclass(eq=False)
class Flight:
    """A request on its way. has_begun: its caller has been given something."""

    request: GenerationRequest
    names: tuple[str, ...]
    on_output: OnOutput
    has_begun: bool = False
    task: asyncio.Task[None] | None = None

    def tell(self, output: Output) -> None:
        """Pass an output on."""
        self.has_begun = True
        self.on_output(output)

    def end(self, finish: FinishReason, error: Exception | None = None) -> None:
        """Pass the last output on."""
        self.tell(Output(self.request.request_id, finish=finish, error=error))


class Fleet:
    """An `Engine`. replicas, directory: handles of Serve."""

    def __init__(self, replicas: Any, directory: Any) -> None:
        self._whole = replicas.whole
        self._stream = replicas.options(stream=True).stream
        self._directory = directory
        self._entries: dict[str, Entry] = {}
        self._overview = Overview()
        self._limits: EngineLimits | None = None
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._retired: set[str] = set()
        self._is_taking = False
        self._counts: Counter[str] = Counter()

    # Life.

    def start(self) -> None:
        """See `Engine.start`."""
        self._is_taking = True

    def stop(self) -> None:
        """See `Engine.stop`."""
        self._is_taking = False
        for flight in list(self._flights.values()):
            self._cancel(flight, FinishReason.FAILED, ShuttingDown("the server has stopped"))

    def drain(self, timeout_s: float | None = None) -> bool:
        """See `Engine.drain`; does not wait, since this would hold up the loop."""
        self._is_taking = False
        return not self._flights

    @property
    def is_ready(self) -> bool:
        """See `Engine.is_ready`."""
        return self._is_taking and self._overview.num_replicas > 0

    @property
    def limits(self) -> EngineLimits:
        """Of one replica, which is what a request may ask for."""
        if self._limits is None:
            raise ShuttingDown("got a request before a replica has started; wanted one that runs; try again later")
        return self._limits

    # What the directory says.

    async def apply(self, orders: Orders) -> None:
        """Take note of changes."""
        self._entries.update(orders.changes)
        self._retired.difference_update(orders.changes)
        if orders.overview is not None:
            self._overview = orders.overview
            self._limits = orders.overview.limits or self._limits

    async def perform(self, task: Task) -> None:
        """What the directory asks of every front."""
        name = task.arguments[0]
        if task.method == "retire":
            await self._retire(name, task.arguments[1])
        elif task.method == "restore":
            self._retired.discard(name)
        else:
            assert task.method == "refresh"  # the overview came with it

    async def _retire(self, name: str, how: Unload) -> None:
        """Take no more requests for an adapter, and see to those that there are."""
        users = [flight for flight in self._flights.values() if name in flight.names]
        if users and how is Unload.REFUSE:
            raise AdapterBusy(f"got adapter {name!r}, which {len(users)} requests use; wait for them, or cancel them")
        self._retired.add(name)
        if how is Unload.CANCEL:
            for flight in users:
                self._cancel(flight, FinishReason.CANCELLED)
        tasks = [flight.task for flight in users if flight.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    # Requests.

    def prepare(self, constraint: Constraint) -> None:
        """See `Engine.prepare`: each replica does so before it submits a request."""

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """See `Engine.submit`. What a replica refuses, and names that nobody has heard of, are errors of the last output."""
        limits = self.limits
        key_of(request, limits)
        check_request(request, limits, has_tokenizer=True)
        if not self._is_taking:
            raise ShuttingDown("got a request for a server that takes none; try another, or later")
        if request.request_id in self._flights:
            raise ConfigError(f"got request id {request.request_id!r}, which is active; wanted one of its own")
        names = names_of(request.adapter)
        for name in names:
            if name in self._retired or self._is_hidden(name):
                raise UnknownAdapter(f"got adapter {name!r}, which was unloaded; wanted one that is loaded")
        self._check_room(request.tenant, limits)
        flight = Flight(request, names, on_output)
        self._flights[request.request_id] = flight
        flight.task = self._spawn(self._fly(flight))

    def _is_hidden(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.is_hidden

    def _check_room(self, tenant: str, limits: EngineLimits) -> None:
        """As many as all replicas together hold."""
        size = max(1, self._overview.num_replicas)
        most, mine = (
            size * (limits.max_running + limits.max_queued),
            size * (limits.max_running_per_tenant + limits.max_queued_per_tenant),
        )
        if len(self._flights) >= most or self._num_of(tenant, mine) >= mine:
            self._counts["refused"] += 1
            raise QueueFull("too many requests wait; come back later", 1.0)

    def _num_of(self, tenant: str, most: int) -> int:
        if len(self._flights) < most:
            return 0
        return sum(flight.request.tenant == tenant for flight in self._flights.values())

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fly(self, flight: Flight) -> None:
        """One request, from here to its last output, whatever happens."""
        try:
            entries = await self._resolved(flight.names)
            await self._try_replicas(flight, ReplicaRequest(flight.request, flight.names, entries))
        except asyncio.CancelledError:
            pass  # `_cancel` has told the caller
        except Exception as error:
            self._end(flight, error if isinstance(error, Exception) else ServingError(str(error)))
        finally:
            if self._flights.get(flight.request.request_id) is flight:
                del self._flights[flight.request.request_id]

    def _end(self, flight: Flight, error: Exception) -> None:
        if not _is_known(error):
            _log.error("a request failed: %s: %s", type(error).__name__, error)
            error = EngineFailed("the replica that had the request failed")
        flight.end(FinishReason.FAILED, error)

    async def _resolved(self, names: tuple[str, ...]) -> Mapping[str, Entry]:
        """The entry of each adapter; the directory is asked for those that nobody has heard of."""
        found = {}
        for name in names:
            entry = self._entries.get(name)
            if entry is None:
                outcome: Outcome = await self._directory.resolve.remote(name)
                if outcome.error is not None:
                    raise outcome.error
                entry = outcome.value
            if entry is None or entry.is_hidden:
                raise unknown_model(name)
            self._entries.setdefault(name, entry)
            found[name] = entry
        return found

    async def _try_replicas(self, flight: Flight, asked: ReplicaRequest) -> None:
        """Until one gives an answer; a part of an answer that the caller has seen is not asked for again."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                return await self._try_one(flight, asked)
            except ReplicaLost:
                self._counts["lost"] += 1
                if flight.has_begun or attempt == MAX_ATTEMPTS - 1:
                    raise
                _log.warning("a replica was lost with a request that had not begun; it is asked of another")
                await asyncio.sleep(BACKOFF_S * attempt)
        return None

    async def _try_one(self, flight: Flight, asked: ReplicaRequest) -> None:
        async for output in self._outputs(asked):
            lost = output.error is not None and isinstance(output.error, (EngineFailed, ShuttingDown))
            if lost:
                raise ReplicaLost(f"the replica that had the request stopped ({output.error})")
            flight.tell(output)
            if output.finish is not None:
                return
        raise ReplicaLost("the replica that had the request ended before its answer")

    async def _outputs(self, asked: ReplicaRequest) -> AsyncIterator[Output]:
        """Of one replica. Raises `ReplicaLost`."""
        call = None
        try:
            if asked.request.whole:
                call = self._whole.remote(asked)
                yield await call
                return
            call = self._stream.remote(asked)
            async for some in call:
                for output in some:
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            if call is not None:
                call.cancel()
            raise
        except (RayActorError, TaskCancelledError) as error:
            raise ReplicaLost(f"the replica that had the request died ({type(error).__name__})") from None
        except (RayError, RayServeException) as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, RoadieError) else error) from None

    def cancel(self, request_id: str) -> bool:
        """See `Engine.cancel`."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        self._cancel(flight, FinishReason.CANCELLED)
        return True

    def _cancel(self, flight: Flight, finish: FinishReason, error: Exception | None = None) -> None:
        self._flights.pop(flight.request.request_id, None)
        if flight.task is not None:
            flight.task.cancel()
        flight.end(finish, error)

    # Adapters.

    def statistics(self) -> Statistics:
        """See `Engine.statistics`: of all replicas together, as they said last."""
        return summed(self._overview.statistics)

    def adapters(self) -> tuple[AdapterStatus, ...]:
        """See `Engine.adapters`."""
        known = {status.name: status for status in self._overview.adapters if not self._is_hidden(status.name)}
        for name in (*self._overview.names, *self._entries):
            if name not in known and not self._is_hidden(name):
                known[name] = AdapterStatus(name, AdapterState.KNOWN)
        retired = self._retired
        return tuple(
            replace(known[name], state=AdapterState.UNLOADING) if name in retired else known[name]
            for name in sorted(known)
        )

    def has_adapter(self, name: str) -> bool:
        """See `Engine.has_adapter`."""
        known = any(status.name == name for status in self._overview.adapters) or name in self._overview.names
        return (known or name in self._entries) and not self._is_hidden(name)

    def own_chat(self, name: str) -> OwnChat | None:
        """See `Engine.own_chat`: copies of adapters hold their config and weights alone."""
        return None

    def left_out(self) -> tuple[LeftOut, ...]:
        """See `Engine.left_out`: shared storage is listed by its names alone."""
        return ()

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        """See `Engine.load_adapter`: when it is done, every replica has it."""
        return self._ordered(self._directory.load.remote(name, path, replace))

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        """See `Engine.unload_adapter`."""
        return self._ordered(self._directory.unload.remote(name, how))

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        """See `Engine.pin_adapter`."""
        return self._ordered(self._directory.pin.remote(name, pinned))

    def _ordered(self, response: Any) -> Future[AdapterStatus]:
        done: Future[AdapterStatus] = Future()

        async def settle() -> None:
            try:
                outcome: Outcome = await response
            except Exception:
                _log.exception("the directory of adapters failed")
                done.set_exception(ShuttingDown("the directory of adapters has gone, and comes back; try again"))
                return
            if outcome.error is not None:
                done.set_exception(outcome.error)
            else:
                done.set_result(outcome.value)

        self._spawn(settle())
        return done


def _is_known(error: Exception) -> bool:
    return isinstance(error, RoadieError) or hasattr(error, "status")
