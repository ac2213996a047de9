"""A front: takes HTTP from Serve's proxies, and asks a replica, which holds the whole server.

A replica that dies, or whose engine does, loses what it was doing. The request is asked of another one, unless the caller has
seen a part of the answer. What a replica says of itself alone is asked of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roadie.errors import EngineFailed, ShuttingDown
from roadie.ray import messages
from roadie.ray.messages import Answer, Call
from roadie.serving.http.failures import ApiError, as_api_error, dumped
from roadie.serving.http.gate import in_time, whole_body
from roadie.serving.http.reply import hung_up
from roadie.serving.http.settings import HttpSettings

_log = logging.getLogger("roadie")
WAITS_S = (0.0, 0.0, 0.1, 0.2, 0.4)
"""Before each attempt."""
GATHERED = {"/v1/status": messages.status, "/v1/adapters": messages.adapters, "/metrics": messages.metrics}


class ReplicaLost(EngineFailed):
    """A replica died, or its engine did, while it had a request."""


@dataclass
class Answering:
    """Passes messages on, and knows whether the caller has been given something."""

    send: Send
    has_begun: bool = False

    async def __call__(self, message: Message) -> None:
        self.has_begun = True
        await self.send(message)


class Front:
    """The deployment. replicas: a handle of Serve."""

    def __init__(self, settings: HttpSettings, replicas: Any) -> None:
        self._settings, self._replicas = settings, replicas
        self._answer = replicas.options(stream=True).answer
        self._revision = 0

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve runs."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._http(scope, receive, send)
            elif scope["type"] == "lifespan":
                for moment in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{moment}.complete"})
            else:
                await send({"type": "websocket.close", "code": 1008})

        return app

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._settings
        try:
            body = await in_time(whole_body(receive, limits.max_body_bytes), limits.body_timeout_s)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        headers, client = tuple(map(tuple, scope["headers"])), scope.get("client")
        call = Call(scope["method"], path, scope["query_string"], headers, client and tuple(client), body)
        work = asyncio.ensure_future(self._serve(call, Answering(send)))
        gone = asyncio.ensure_future(hung_up(receive))
        try:
            done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()  # raises what nobody foresaw, for Serve to answer
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _serve(self, call: Call, send: Answering) -> None:
        ask = self._gather if call.method == "GET" and call.path in GATHERED else self._ask_one
        error: Exception = EngineFailed("every replica that had the request failed")
        try:
            for wait_s in WAITS_S:
                await asyncio.sleep(wait_s)
                with contextlib.suppress(ReplicaLost):
                    await ask(call, send)
                    return
                if send.has_begun:
                    break
        except (RayError, RayServeException) as failure:
            _log.exception("a request failed")
            error = ShuttingDown(f"got no replica that answers ({type(failure).__name__}); try again later")
        await self._fail(as_api_error(error), send)

    async def _fail(self, error: ApiError, send: Answering) -> None:
        if send.has_begun:
            await send({"type": "http.response.body", "body": f"data: {dumped(error.body)}\n\n".encode()})
            return
        response = error.response()
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body)})

    async def _ask_one(self, call: Call, send: Answering) -> None:
        """The answer of the replica that Serve chooses. Raises `ReplicaLost`."""
        answer = self._answer.remote(replace(call, revision=self._revision))
        try:
            async for revision, some in answer:
                self._revision = max(self._revision, revision)
                for message in some:
                    await send(message)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except (RayActorError, TaskCancelledError) as error:
            _log.warning("a replica died that had a request (%s)", type(error).__name__)
            raise ReplicaLost("a replica died that had a request") from None
        except RayError as error:
            if isinstance(getattr(error, "cause", None), EngineFailed):
                raise ReplicaLost("the engine of a replica failed that had a request") from None
            raise

    async def _gather(self, call: Call, send: Answering) -> None:
        """All replicas' answers as one; where one refuses, its refusal."""
        found = await self._replicas.broadcast("collected", call).results_async(return_exceptions=True)
        answers = [answer for answer in found if isinstance(answer, Answer)]
        if not answers:
            raise ReplicaLost("no replica has answered")
        first = next((answer for answer in answers if answer.status != 200), answers[0])
        body = first.body if first.status != 200 else GATHERED[call.path](answers)
        headers = [(name, value) for name, value in first.headers if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": first.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
