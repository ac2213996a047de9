"""The directory of adapters: one process that decides which version each name has, and sees to it that all replicas know.

A change goes in three steps. One replica tries it; it is written to shared storage; all replicas that run follow, by Serve's
broadcast. Where one refuses, all is as it was. Only then is the operator told. A replica that has the new version never answers
with the old one; while the others follow, each answer is of one version.

A replica that starts asks for the catalogue as it is, and each asks again at every health check. One that dies is not waited for.
Where the directory itself dies, Serve starts it again and it reads what was written; what was going on fails as a whole, and may
be asked for again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from roadie.adapter import check_adapter_name
from roadie.errors import ConfigError, RoadieError, ShuttingDown, UnknownAdapter
from roadie.ray.catalogue import Catalogue, Entry, parse
from roadie.ray.storage import SharedAdapters
from roadie.serving.engine import AdapterStatus, Unload


class Directory:
    """The deployment. replicas: the name of theirs, in the same application."""

    def __init__(self, uri: str, allow_from: tuple[str, ...], max_bytes: int, replicas: str) -> None:
        self._shared = SharedAdapters(uri, allow_from, max_bytes)
        self._catalogue = parse(self._shared.read_catalogue())
        self._replicas = serve.get_deployment_handle(replicas, serve.get_replica_context().app_name)
        self._writing = asyncio.Lock()
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def newer(self, revision: int) -> Catalogue | None:
        """The catalogue, where it is newer than that."""
        return self._catalogue if self._catalogue.revision > revision else None

    async def resolve(self, name: str) -> Catalogue:
        """The catalogue, with an adapter that may have been put into the folder."""
        if name not in self._catalogue.entries and await asyncio.to_thread(self._shared.has, name):
            digest = await asyncio.to_thread(self._shared.publish, name)
            if name not in self._catalogue.entries:
                await self._commit(name, Entry(digest))
        return self._catalogue

    async def load(self, name: str, path: str | None, replace_it: bool) -> AdapterStatus:
        """`Engine.load_adapter`, over all replicas."""
        check_adapter_name(name)
        source = None if path in (None, name) else path
        async with self._busy[name]:
            before = self._catalogue.current(name)
            if before and not replace_it and (before.is_loaded or before.source != source):
                raise ConfigError(f"got {name!r}, which is loaded already; use replace, or unload it first")
            digest = await asyncio.to_thread(self._shared.publish, source or name)
            is_pinned = before is not None and before.is_pinned
            return await self._change(name, Entry(digest, is_pinned, is_loaded=True, source=source))

    async def unload(self, name: str, how: Unload) -> AdapterStatus:
        """`Engine.unload_adapter`, over all replicas."""
        async with self._busy[name]:
            return await self._change(name, Entry((await self._known(name)).digest, is_hidden=True), how)

    async def pin(self, name: str, is_pinned: bool) -> AdapterStatus:
        """`Engine.pin_adapter`, over all replicas."""
        async with self._busy[name]:
            return await self._change(name, replace(await self._known(name), is_pinned=is_pinned))

    async def _known(self, name: str) -> Entry:
        entry = (await self.resolve(name)).current(name)
        if entry is None:
            raise UnknownAdapter(
                f"got adapter {name[:200]!r}; wanted one of those in the folder of adapters, or one that was loaded; put it "
                "there or load it"
            )
        return entry

    async def _change(self, name: str, entry: Entry, how: Unload = Unload.WAIT) -> AdapterStatus:
        before = self._catalogue.entries.get(name)
        try:
            if not entry.is_hidden:
                await told(self._replicas.attempt.remote(name, entry))
            await self._commit(name, entry)
            return await self._followed(name, how)
        except RoadieError:
            if self._catalogue.entries.get(name) != before:
                await self._commit(name, before)
            await self._followed(name, Unload.WAIT)
            raise

    async def _commit(self, name: str, entry: Entry | None) -> None:
        """Write a change down; raises `StateNotWritten`, and nothing has changed then."""
        async with self._writing:
            changed = self._catalogue.changed(name, entry)
            await asyncio.to_thread(self._shared.write_catalogue, changed.as_bytes())
            self._catalogue = changed

    async def _followed(self, name: str, how: Unload) -> AdapterStatus:
        """What a replica says of an adapter once all follow; raises the first error that is not of a replica that died."""
        asked = self._replicas.broadcast("follow", self._catalogue, name, how)
        found = await told(asked.results_async(return_exceptions=True))
        for result in found:
            if isinstance(getattr(result, "cause", None), RoadieError):
                raise result.cause
        statuses = [result for result in found if isinstance(result, AdapterStatus)]
        if not statuses:
            raise ShuttingDown("got no replica that runs; wanted one to have the adapter; try again later")
        return statuses[0]


async def told(response: Any) -> Any:
    """What another process of Serve answers; what it raises of roadie's is raised as it was, and otherwise `ShuttingDown`."""
    try:
        return await response
    except (RayError, RayServeException) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RoadieError):
            raise cause from None
        raise ShuttingDown(
            f"got no answer of another process ({type(error).__name__}); it comes back; try again"
        ) from None
