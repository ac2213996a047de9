"""A replica: the whole server of `roadie serve` but its socket, over the adapters that all replicas share."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from prometheus_client import disable_created_metrics
from ray import serve
from starlette.types import Message

from roadie.errors import EngineFailed, ShuttingDown
from roadie.ray.catalogue import Catalogue, Entry
from roadie.ray.config import Deployment
from roadie.ray.messages import Answer, Call
from roadie.ray.shelf import Shelf
from roadie.ray.storage import SharedAdapters
from roadie.serving.batch_engine import ContinuousBatchingEngine
from roadie.serving.engine import AdapterStatus, Unload
from roadie.serving.http.app import make_app, make_service
from roadie.serving.http.keys import Keys
from roadie.serving.registry import Registry
from roadie.training.models import ModelSource, best_device, load_model, load_tokenizer


class Replica:
    """The deployment; Serve makes as many as it is told. directory: a handle. keys: None: nobody administers."""

    async def __init__(self, deployment: Deployment, keys: Keys | None, directory: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        disable_created_metrics()
        self._folder = Path(tempfile.mkdtemp(prefix="roadie-replica-", dir=deployment.scratch))
        engine, tokenizer = await asyncio.to_thread(_engine, deployment, self._folder)
        assert deployment.adapters is not None
        shared = await asyncio.to_thread(SharedAdapters, deployment.adapters, (), deployment.limits.max_adapter_bytes)
        self._shelf = Shelf(engine, shared, self._folder / "versions", directory)
        self._service: Any = make_service(self._shelf, tokenizer, deployment.http, keys)
        self._app = make_app(self._service)
        await asyncio.to_thread(engine.start)
        self._catching_up = asyncio.ensure_future(self._shelf.catch_up())
        await self._catching_up

    # What Serve asks.

    async def check_health(self) -> None:
        """Raises where the engine has failed, or an adapter that is in force cannot be used here: Serve starts another.

        What the replica missed it catches up with meanwhile, which may take as long as an adapter's last request.
        """
        if not self._shelf.is_ready:
            raise EngineFailed("the engine of this replica takes no requests")
        if self._catching_up.done():
            failure, self._catching_up = self._catching_up.exception(), asyncio.ensure_future(self._shelf.catch_up())
            if failure is not None and not isinstance(failure, ShuttingDown):  # the directory's, which comes back
                raise failure

    async def __del__(self) -> None:
        await asyncio.to_thread(self._service.stop)
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    # What the directory asks.

    async def attempt(self, name: str, entry: Entry) -> None:
        """Have an adapter as an entry says that is in force nowhere yet."""
        await self._shelf.bring(name, entry)

    async def follow(self, catalogue: Catalogue, name: str, how: Unload) -> AdapterStatus:
        """Be as a catalogue says; how the adapter stands then that it is about."""
        await self._shelf.follow(catalogue, how)
        return self._shelf.status(name)

    # What fronts ask.

    async def answer(self, call: Call) -> AsyncIterator[tuple[int, list[Message]]]:
        """The answer as it comes, those messages together that have come since the last were taken; with the revision.

        Raises `EngineFailed` instead of an answer that says so, since another replica may do better.
        """
        if call.revision > self._shelf.revision:
            await self._shelf.learn()
        async with aclosing(self._messages(call)) as coming:
            async for some in coming:
                if some[0].get("status") == 503 and not self._shelf.is_ready:
                    raise EngineFailed("the engine of this replica takes no requests")
                yield self._shelf.revision, some

    async def collected(self, call: Call) -> Answer:
        """The answer as a whole."""
        messages = [message async for some in self._messages(call) for message in some]
        body = b"".join(message.get("body", b"") for message in messages)
        replica = serve.get_replica_context().replica_id.unique_id
        return Answer(replica, messages[0]["status"], tuple(messages[0]["headers"]), body)

    async def _messages(self, call: Call) -> AsyncGenerator[list[Message], None]:
        asked: asyncio.Queue[Message] = asyncio.Queue()
        asked.put_nowait({"type": "http.request", "body": call.body, "more_body": False})
        arrived: asyncio.Queue[Message | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._app(call.scope(), asked.get, arrived.put))
        work.add_done_callback(lambda _: arrived.put_nowait(None))
        is_live = True
        try:
            while is_live:
                some = [await arrived.get()]
                while not arrived.empty():
                    some.append(arrived.get_nowait())
                is_live = some[-1] is not None
                if found := [message for message in some if message is not None]:
                    yield found
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _engine(deployment: Deployment, folder: Path) -> tuple[ContinuousBatchingEngine, Any]:
    """An engine that is not started yet, and the tokenizer; it finds no adapters by itself: what there is the catalogue says."""
    source = ModelSource(deployment.model, deployment.revision, deployment.trust_remote_code, deployment.allow_pickle)
    (folder / "none").mkdir()
    (folder / "versions").mkdir()
    registry = Registry.open(
        folder / "none",
        state_file=folder / "state.json",
        allowed_roots=[folder / "versions"],
        max_adapter_bytes=deployment.limits.max_adapter_bytes,
    )
    model: Any = load_model(source).to(best_device())
    tokenizer = load_tokenizer(source)
    return ContinuousBatchingEngine(model, tokenizer, registry, deployment.limits), tokenizer
