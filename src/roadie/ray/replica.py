"""A replica: one engine, the adapters it was asked for, and what the directory says of them.

A request names the versions that its front knows. A replica that is behind loads them first, so that no answer is of an
older adapter than the caller was told of.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve

from roadie.errors import EngineFailed, RoadieError, UnknownAdapter
from roadie.ray.catalogue import Entry
from roadie.ray.config import Deployment
from roadie.ray.engines import make_engine
from roadie.ray.membership import Follower, Orders, Report, Role, Task
from roadie.ray.messages import ReplicaRequest, merged
from roadie.ray.routing import RESIDENTS
from roadie.ray.storage import SharedAdapters
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    Engine,
    FinishReason,
    Output,
    Unload,
)

_log = logging.getLogger("roadie")
PROBE = "roadie_probe_"


class Shelf:
    """The adapters of an engine: fetched, loaded, replaced and let go; each change whole, one at a time for each name."""

    def __init__(self, engine: Engine, shared: SharedAdapters, folder: Path) -> None:
        self._engine, self._shared, self._folder = engine, shared, folder
        self._entries: dict[str, Entry] = {}
        self._loaded: dict[str, str] = {}
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def apply(self, changes: Mapping[str, Entry], *, is_first: bool = False) -> None:
        """Take note of entries, and load those that are to be had at once; at the start those that are pinned alone."""
        self._entries.update(changes)
        for name, entry in changes.items():
            if entry.is_hidden:
                await self._let_go(name)
            elif entry.is_pinned or (entry.is_loaded and not is_first) or name in self._loaded:
                await self.bring(name, entry)
                if entry.is_pinned or not is_first:
                    await asyncio.wrap_future(self._engine.pin_adapter(name, entry.is_pinned))

    async def bring(self, name: str, entry: Entry | None) -> None:
        """Have the engine know the version of an entry, or of a later one. Raises `UnknownAdapter` for one that was unloaded."""
        entry = self._latest(name, entry)
        if self._loaded.get(name) == entry.digest:
            return
        async with self._busy[name]:
            entry = self._latest(name, entry)
            before = self._loaded.get(name)
            if before == entry.digest:
                return
            assert entry.digest is not None
            folder = await asyncio.to_thread(self._shared.fetch, entry.digest, self._folder)
            await asyncio.wrap_future(self._engine.load_adapter(name, str(folder), replace=True))
            self._loaded[name] = entry.digest
            await self._drop_unused(before)

    def _latest(self, name: str, entry: Entry | None) -> Entry:
        known = self._entries.get(name)
        if known is None or (entry is not None and entry.revision > known.revision):
            known = entry
        if known is None or known.is_hidden or known.digest is None:
            raise UnknownAdapter(f"got adapter {name!r}, which was unloaded; wanted one that is loaded")
        self._entries[name] = known
        return known

    async def _let_go(self, name: str) -> None:
        async with self._busy[name]:
            digest = self._loaded.pop(name, None)
            if digest is not None:
                with suppress(UnknownAdapter):
                    await asyncio.wrap_future(self._engine.unload_adapter(name, Unload.CANCEL))
                await self._drop_unused(digest)

    async def _drop_unused(self, digest: str | None) -> None:
        if digest is not None and digest not in self._loaded.values():
            await asyncio.to_thread(shutil.rmtree, self._folder / digest, True)

    async def check(self, digest: str) -> None:
        """Fetch a version and try it under a name that nobody asks for; raises what is wrong with it."""
        if digest in self._loaded.values():
            return
        probe = f"{PROBE}{digest[:16]}"
        async with self._busy[probe]:
            folder = await asyncio.to_thread(self._shared.fetch, digest, self._folder)
            try:
                await asyncio.wrap_future(self._engine.load_adapter(probe, str(folder), replace=True))
            except RoadieError:
                await self._drop_unused(digest)
                raise
            await asyncio.wrap_future(self._engine.unload_adapter(probe, Unload.CANCEL))

    async def pin(self, name: str, entry: Entry, is_pinned: bool) -> None:
        """Load and pin, or unpin."""
        if is_pinned or name in self._loaded:
            await self.bring(name, entry)
            await asyncio.wrap_future(self._engine.pin_adapter(name, is_pinned))

    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Of adapters that are in slots, or that requests use or have used."""
        return tuple(
            status
            for status in self._engine.adapters()
            if not status.name.startswith(PROBE) and (status.state is not AdapterState.KNOWN or status.num_requests)
        )


class Replica:
    """The deployment; Serve makes as many as it is told. directory: a handle."""

    async def __init__(self, deployment: Deployment, directory: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        self._folder = Path(tempfile.mkdtemp(prefix="roadie-replica-", dir=deployment.scratch))
        versions = self._folder / "versions"
        versions.mkdir()
        assert deployment.adapters is not None
        shared = await asyncio.to_thread(SharedAdapters, deployment.adapters, (), deployment.limits.max_adapter_bytes)
        self._engine = await asyncio.to_thread(make_engine, deployment, self._folder)
        await asyncio.to_thread(self._engine.start)
        self._shelf = Shelf(self._engine, shared, versions)
        self._is_first = True
        self._follower = Follower(directory, _own_id(), Role.REPLICA, self._apply, self._perform, self._report)
        await self._follower.begin(ray.get_runtime_context().current_actor)

    async def _apply(self, orders: Orders) -> None:
        await self._shelf.apply(orders.changes, is_first=self._is_first)
        self._is_first = False

    async def _perform(self, task: Task) -> Any:
        if task.method == "check":
            return await self._shelf.check(task.arguments[1])
        assert task.method == "pin"
        return await self._shelf.pin(*task.arguments)

    def _report(self) -> Report:
        engine = self._engine
        return Report(engine.is_ready, engine.limits, engine.statistics(), self._shelf.statuses())

    # What Serve asks.

    def check_health(self) -> None:
        """Raises where the engine has failed, or an adapter that was published cannot be used here: Serve starts another."""
        if not self._engine.is_ready:
            raise EngineFailed("the engine of this replica takes no requests")
        if self._follower.failure is not None:
            raise self._follower.failure

    def record_routing_stats(self) -> dict[str, Any]:
        """What routers are told."""
        return {RESIDENTS: [status.name for status in self._shelf.statuses() if status.state is AdapterState.RESIDENT]}

    async def __del__(self) -> None:
        self._follower.close()
        await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    # What fronts ask.

    async def whole(self, asked: ReplicaRequest) -> Output:
        """The whole answer to a request, as one output."""
        outputs: list[Output] = []
        async for some in self.stream(asked):
            outputs += some
        return merged(outputs)

    async def stream(self, asked: ReplicaRequest) -> AsyncIterator[list[Output]]:
        """Outputs as they come, those together that have come since the last were taken. Errors are outputs, too."""
        try:
            for name in asked.names:
                await self._shelf.bring(name, (asked.entries or {}).get(name))
            async with submitted(self._engine, asked) as arrived:
                is_live = True
                while is_live:
                    some = [await arrived.get()]
                    while not arrived.empty():
                        some.append(arrived.get_nowait())
                    is_live = some[-1].finish is None
                    yield some
        except RoadieError as error:
            yield [Output(asked.request.request_id, finish=FinishReason.FAILED, error=error)]


@asynccontextmanager
async def submitted(engine: Engine, asked: ReplicaRequest) -> AsyncIterator[asyncio.Queue[Output]]:
    """The outputs of a request, which is cancelled where the block ends before it."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Output] = asyncio.Queue()

    def take(output: Output) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, output)

    constraint = asked.request.constraint
    if constraint is not None:
        await asyncio.to_thread(engine.prepare, constraint)
    engine.submit(asked.request, take)
    try:
        yield arrived
    finally:
        engine.cancel(asked.request.request_id)


def _own_id() -> str:
    return str(serve.get_replica_context().replica_tag)
