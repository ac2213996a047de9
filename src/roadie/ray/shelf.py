"""The engine of a replica with the adapters of the catalogue: fetched, loaded, replaced and let go, one at a time for each name.

Operators' verbs go to the directory, and come back to all replicas as a catalogue to follow. All methods are called on the
event loop of the replica.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from roadie.bank.blends import Blend, parse
from roadie.errors import RoutingError, UnknownAdapter
from roadie.ray.catalogue import Catalogue, Entry
from roadie.ray.directory import told
from roadie.ray.storage import SharedAdapters
from roadie.serving.engine import (
    AdapterState,
    AdapterStatus,
    AdapterWish,
    Engine,
    FinishReason,
    GenerationRequest,
    OnOutput,
    Output,
    Unload,
)
from roadie.serving.http.failures import unknown_model


def names_of(wish: AdapterWish) -> tuple[str, ...]:
    """The adapters that a request needs; none for the base model, or for what is no wish at all."""
    try:
        key = parse(wish)
    except RoutingError:
        return ()
    return () if key is None else key.names if isinstance(key, Blend) else (key,)


class Shelf:
    """An `Engine`: that of this machine, with the differences above. directory: a handle of Serve. folder: for copies."""

    def __init__(self, engine: Engine, shared: SharedAdapters, folder: Path, directory: Any) -> None:
        self._engine, self._shared, self._folder, self._directory = engine, shared, folder, directory
        self._catalogue = Catalogue(-1)
        self._names: tuple[str, ...] = ()
        self._loaded: dict[str, str] = {}  # the digest of each
        self._pinned: set[str] = set()
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._following: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        """What is as the engine of one machine has it."""
        return getattr(self._engine, name)

    # What the catalogue says.

    @property
    def revision(self) -> int:
        """Of the catalogue that is followed."""
        return self._catalogue.revision

    async def learn(self) -> asyncio.Task[None]:
        """Know the catalogue as it is now; following it goes on."""
        newer = await told(self._directory.newer.remote(self.revision))
        following = asyncio.ensure_future(self.follow(newer or self._catalogue))
        self._following.add(following)
        following.add_done_callback(self._following.discard)
        await asyncio.sleep(0)
        return following

    async def catch_up(self) -> None:
        """Follow the catalogue as it is now, and look at the folder."""
        await (await self.learn())
        self._names = await asyncio.to_thread(self._shared.names)

    async def follow(self, catalogue: Catalogue, how: Unload = Unload.WAIT) -> None:
        """Have what operators loaded, at the start what is pinned alone; what has another version here is replaced."""
        if catalogue.revision < self.revision:
            return
        before, self._catalogue = self._catalogue, catalogue
        changed = {name for name, entry in catalogue.entries.items() if before.entries.get(name) != entry}
        for name in changed | set(self._loaded):
            entry = catalogue.current(name)
            if entry is None:
                await self._let_go(name, how)
            elif name in self._loaded or entry.is_pinned or (entry.is_loaded and before.revision >= 0):
                await self.bring(name)

    async def bring(self, name: str, entry: Entry | None = None) -> None:
        """Have the engine know the version in force, or that of an entry. Raises `UnknownAdapter` where there is none."""
        self._in_force(name, entry)  # not after a wait for what is being unloaded
        async with self._busy[name]:
            entry = self._in_force(name, entry)
            before = self._loaded.get(name)
            if before != entry.digest:
                folder = await asyncio.to_thread(self._shared.fetch, entry.digest, self._folder)
                await asyncio.wrap_future(self._engine.load_adapter(name, str(folder), replace=True))
                self._loaded[name] = entry.digest
                await self._drop_unused(before)
            if entry.is_pinned != (name in self._pinned):
                await asyncio.wrap_future(self._engine.pin_adapter(name, entry.is_pinned))
                (self._pinned.add if entry.is_pinned else self._pinned.discard)(name)

    def _in_force(self, name: str, entry: Entry | None) -> Entry:
        entry = entry or self._catalogue.current(name)
        if entry is None:
            raise UnknownAdapter(f"got adapter {name!r}, which was unloaded; wanted one that is loaded")
        return entry

    async def _let_go(self, name: str, how: Unload) -> None:
        async with self._busy[name]:
            if name in self._loaded:
                await asyncio.wrap_future(self._engine.unload_adapter(name, how))
                self._pinned.discard(name)
                await self._drop_unused(self._loaded.pop(name))

    async def _drop_unused(self, digest: str | None) -> None:
        if digest is not None and digest not in self._loaded.values():
            await asyncio.to_thread(shutil.rmtree, self._folder / digest, True)

    # What differs from the engine of one machine.

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """See `Engine.submit`. What becomes of names that are not here yet is told with the last output."""
        names = names_of(request.adapter)
        if all(self._is_here(name) for name in names):
            self._engine.submit(request, on_output)
        else:
            bringing = asyncio.ensure_future(self._bring_and_submit(names, request, on_output))
            self._coming[request.request_id] = bringing

    def _is_here(self, name: str) -> bool:
        entry = self._catalogue.current(name)
        return entry is not None and self._loaded.get(name) == entry.digest

    async def _bring_and_submit(self, names: tuple[str, ...], request: GenerationRequest, on_output: OnOutput) -> None:
        error: Exception | None = None
        try:
            for name in names:
                if name not in self._catalogue.entries:
                    await self.follow(await told(self._directory.resolve.remote(name)))
                await self.bring(name)
            self._engine.submit(request, on_output)
        except UnknownAdapter:
            error = unknown_model(", ".join(names))
        except Exception as problem:
            error = problem
        finally:
            self._coming.pop(request.request_id, None)
        if error is not None:
            on_output(Output(request.request_id, finish=FinishReason.FAILED, error=error))

    def cancel(self, request_id: str) -> bool:
        """See `Engine.cancel`."""
        coming = self._coming.pop(request_id, None)
        return coming.cancel() if coming is not None else self._engine.cancel(request_id)

    def adapters(self) -> tuple[AdapterStatus, ...]:
        """See `Engine.adapters`: also of those that lie in the folder."""
        found = {status.name: status for status in self._engine.adapters()}
        known = {*self._names, *self._catalogue.entries, *found}
        hidden = {name for name, entry in self._catalogue.entries.items() if entry.is_hidden} - set(self._loaded)
        return tuple(
            replace(found.get(name) or AdapterStatus(name, AdapterState.KNOWN), path=self._source(name))
            for name in sorted(known - hidden)
        )

    def _source(self, name: str) -> str:
        entry = self._catalogue.entries.get(name)
        return self._shared.place((entry and entry.source) or name)

    def status(self, name: str) -> AdapterStatus:
        """How one stands here."""
        found = (status for status in self.adapters() if status.name == name)
        return next(found, AdapterStatus(name, AdapterState.KNOWN))

    def has_adapter(self, name: str) -> bool:
        """See `Engine.has_adapter`."""
        return self._catalogue.current(name) is not None or (
            name in self._names and name not in self._catalogue.entries
        )

    def load_adapter(self, name: str, path: str | None = None, *, replace: bool = False) -> Future[AdapterStatus]:
        """See `Engine.load_adapter`: when it is done, every replica has it."""
        return _future(told(self._directory.load.remote(name, path, replace)))

    def unload_adapter(self, name: str, how: Unload = Unload.WAIT) -> Future[AdapterStatus]:
        """See `Engine.unload_adapter`."""
        return _future(told(self._directory.unload.remote(name, how)))

    def pin_adapter(self, name: str, pinned: bool = True) -> Future[AdapterStatus]:
        """See `Engine.pin_adapter`."""
        return _future(told(self._directory.pin.remote(name, pinned)))


def _future(work: Any) -> Future[AdapterStatus]:
    return asyncio.run_coroutine_threadsafe(work, asyncio.get_running_loop())
