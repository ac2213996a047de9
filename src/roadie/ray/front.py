"""A front: the HTTP side of `roadie serve`, over all replicas. Serve's proxies hand requests to it."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from roadie.ray.config import Deployment
from roadie.ray.engines import source_of
from roadie.ray.fleet import Fleet
from roadie.ray.membership import Follower, Role
from roadie.serving.http.app import make_app, make_service
from roadie.serving.http.keys import Keys
from roadie.training.models import load_tokenizer

WAIT_S = 0.2


class Front:
    """The deployment. keys: None: everybody may generate, nobody administer."""

    async def __init__(self, deployment: Deployment, keys: Keys | None, directory: Any, replicas: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        tokenizer = await asyncio.to_thread(load_tokenizer, source_of(deployment))
        self._fleet = Fleet(replicas, directory)
        self._service = make_service(self._fleet, tokenizer, deployment.http, keys)
        own_id = str(serve.get_replica_context().replica_tag)
        self._follower = Follower(directory, own_id, Role.FRONT, self._fleet.apply, self._fleet.perform)
        await self._follower.begin(ray.get_runtime_context().current_actor)
        self._fleet.start()
        while not self._fleet.is_ready:
            await asyncio.sleep(WAIT_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, once everything else is there."""
        return make_app(self._service)

    def check_health(self) -> None:
        """Raises where this front does not hear of changes: Serve starts another."""
        if self._follower.failure is not None:
            raise self._follower.failure

    async def __del__(self) -> None:
        self._follower.close()
        self._fleet.stop()
        self._service.prompts.close()
