"""Before any route: who it is, whether they may, whether there is room, and a body that is neither too long nor too slow.

    observed        an id, a place in the counts, and headers that keep browsers from doing harm
    host            a page elsewhere cannot have a browser on this machine talk to the server under another name
    key             401, 403
    room            503 while stopping; 429 where too many generate already
    body            415, 413, 408; read whole before anything is made of it

The gate counts who is inside, so that a server that stops knows when the last accepted request has been answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roadie.serving.http.failures import SERVER, ApiError, as_api_error
from roadie.serving.http.keys import ANONYMOUS, Caller, Keys
from roadie.serving.http.metrics import Metrics
from roadie.serving.http.settings import HttpSettings

_log = logging.getLogger("roadie.serving.http")
MAX_DISCARDED_BYTES = 64 << 20
Coming = TypeVar("Coming")


class Right(Enum):
    """What a route asks of its caller."""

    NONE = "none"
    KEY = "key"
    ADMIN = "admin"


@dataclass(frozen=True)
class Route:
    """How the gate treats a path.

    kinds: of bodies that are taken beside JSON. max_body_bytes: None: the server's. is_streamed: the route reads the body as it
    comes; it is counted here, and may take as long as some of it comes in time. errors: that no other route answers with.
    """

    right: Right = Right.KEY
    generates: bool = False
    kinds: tuple[str, ...] = ()
    max_body_bytes: int | None = None
    is_streamed: bool = False
    errors: tuple[int, ...] = ()


ROUTES = {
    "/": Route(Right.NONE),
    "/page.js": Route(Right.NONE),
    "/page.css": Route(Right.NONE),
    "/icon.svg": Route(Right.NONE),
    "/health": Route(Right.NONE),
    "/ready": Route(Right.NONE),
    "/metrics": Route(Right.NONE),
    "/openapi.json": Route(Right.NONE),
    "/ping": Route(Right.NONE),
    "/version": Route(Right.NONE),
    "/tokenize": Route(errors=(404,)),
    "/detokenize": Route(errors=(404,)),
    "/v1/embeddings": Route(),
    "/v1/completions": Route(generates=True),
    "/v1/chat/completions": Route(generates=True),
    "/v1/responses": Route(generates=True),
    "/v1/models": Route(),
    "/v1/models/{model}": Route(),
    "/v1/status": Route(),
    "/v1/adapters": Route(),
    "/v1/adapters/load": Route(Right.ADMIN),
    "/v1/adapters/unload": Route(Right.ADMIN),
    "/v1/adapters/pin": Route(Right.ADMIN),
    "/v1/load_lora_adapter": Route(Right.ADMIN),
    "/v1/unload_lora_adapter": Route(Right.ADMIN),
}
UNKNOWN = "(unknown)"
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Routes:
    """Which route a path is of; a part of a path in braces stands for anything, without slashes but at the models' own."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        patterns = {path: re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)) for path in routes if "{" in path}
        patterns["/v1/models/{model}"] = "/v1/models/.*"
        self._patterns = [(re.compile(pattern, re.DOTALL), path) for path, pattern in patterns.items()]

    def __getitem__(self, path: str) -> Route:
        return self._routes[path]

    def of(self, path: str) -> str:
        """The route of a path; `UNKNOWN` where there is none."""
        if path in self._routes:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), UNKNOWN)

    def treatment(self, path: str) -> Route:
        """How a path is treated."""
        return self._routes.get(self.of(path), Route(Right.NONE))


class Gate:
    """The application behind it sees only what may come in. keys: None where everybody may generate and nobody administer.

    routes: beside `ROUTES`.
    """

    def __init__(
        self, settings: HttpSettings, keys: Keys | None, metrics: Metrics, routes: Mapping[str, Route] | None = None
    ) -> None:
        self.settings, self.keys, self._metrics = settings, keys, metrics
        self.routes = Routes({**ROUTES, **(routes or {})})
        self.is_open = True  # whether new requests to generate are taken
        self._inside: Counter[str] = Counter()
        self._left = asyncio.Event()
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    @property
    def num_inside(self) -> int:
        """Requests that generate, accepted and not yet answered."""
        return sum(self._inside.values())

    async def wait(self, seconds: float) -> None:
        """Until a request has been answered, or so long."""
        self._left.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application behind the gate."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._observe(app, scope, receive, send)
            elif scope["type"] == "lifespan":
                await app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})

        return guarded

    async def _observe(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["arrived_s"], request_id = time.monotonic(), uuid.uuid4().hex
        status = [0]

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                own = [(b"x-request-id", request_id.encode()), *_SAFE_HEADERS]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            await self._admit(app, scope, receive, observed_send)
        except Exception as error:  # it has been logged, or is now; the server's own log would show its message
            if not status[0]:
                await as_api_error(error).response()(scope, receive, observed_send)
        finally:
            self._count(scope, status[0], request_id)

    def _count(self, scope: Scope, status: int, request_id: str) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "(other)"
        route, caller = self.routes.of(scope["path"]), scope["state"].get("caller", ANONYMOUS)
        self._metrics.http_requests.labels(route, method, str(status)).inc()
        seconds = time.monotonic() - scope["state"]["arrived_s"]
        _log.info("%s %s %s %s %s %.3f s", request_id, caller.name, method, route, status or "gone", seconds)

    async def _admit(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            route = self.routes.treatment(scope["path"])
            headers = Headers(scope=scope)
            self._check_host(headers)
            right = Right.NONE if scope["method"] == "OPTIONS" else route.right
            caller = scope["state"]["caller"] = self._caller(headers, right)
            if not (route.generates and scope["method"] == "POST"):
                await app(_head_as_get(scope), await self._body(scope, route, headers, receive), send)
                return
            self._check_room(caller)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._inside[caller.name] += 1
        try:
            await app(scope, await self._body(scope, route, headers, receive), send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self._inside[caller.name] -= 1
            self._left.set()

    # Who, and whether.

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if self._hosts and name not in self._hosts:
            message = "got another Host than this server has; wanted one of its own; see --allowed-host"
            raise ApiError(403, message, "wrong_host", "permission_error")

    def _caller(self, headers: Headers, right: Right) -> Caller:
        if self.keys is None:
            if right is Right.ADMIN:
                message = "this server has no API keys, and so nobody who may administer; start it with --api-keys"
                raise ApiError(403, message, "no_admin_keys", "permission_error")
            return ANONYMOUS
        caller = self._known(headers)
        if right is Right.NONE:
            return caller or Caller("(nobody)", ())
        if caller is None:
            message = "got no API key, or one that is not known; wanted Authorization: Bearer KEY"
            www = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", "authentication_error", headers=www)
        if right is Right.ADMIN and not caller.is_admin:
            raise ApiError(403, "this key may not administer", "not_an_admin", "permission_error")
        return caller

    def _known(self, headers: Headers) -> Caller | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = (key if scheme.lower() == "bearer" else headers.get("x-api-key", "")).strip()
        return self.keys.caller(key) if key and self.keys is not None else None

    def _check_room(self, caller: Caller) -> None:
        if not self.is_open:
            raise ApiError(
                503, "the server is stopping; try another, or later", "shutting_down", SERVER, retry_after_s=5
            )
        limits = self.settings
        is_full = self.num_inside >= limits.max_concurrent_requests
        if is_full or self._inside[caller.name] >= limits.max_concurrent_per_key:
            whose = "" if is_full else " with this key"
            message = f"too many requests{whose} are being answered; come back later"
            raise ApiError(429, message, "too_many_requests", "rate_limit_error", retry_after_s=1)

    # The body.

    async def _body(self, scope: Scope, route: Route, headers: Headers, receive: Receive) -> Receive:
        """What the application is to read from: the whole body, then whether the client hangs up."""
        limit = route.max_body_bytes or self.settings.max_body_bytes
        if route.is_streamed and scope["method"] == "POST":
            self._check_length(headers, limit)
            return _counted(receive, limit, self.settings.body_timeout_s)
        body = await self._read(headers, receive, limit)
        if body and scope["method"] == "POST" and not (_is_json(headers) or _kind(headers) in route.kinds):
            raise ApiError(
                415, "got a body that is not said to be JSON; wanted Content-Type: application/json", "not_json"
            )
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _check_length(self, headers: Headers, limit: int) -> None:
        length, waits = headers.get("content-length", "0"), "expect" in headers  # for leave to send its body
        if length.isdecimal() and int(length[:20]) > limit + (0 if waits else MAX_DISCARDED_BYTES):
            raise _too_long(limit)

    async def _read(self, headers: Headers, receive: Receive, limit: int) -> bytes:
        self._check_length(headers, limit)
        return await in_time(whole_body(receive, limit), self.settings.body_timeout_s)


def _head_as_get(scope: Scope) -> Scope:
    """HEAD is GET without the body, which whoever sends the answer leaves out."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def _kind(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_json(headers: Headers) -> bool:
    kind = _kind(headers)
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413, f"got a body of more than {limit} bytes; send less", "body_too_long", headers={"connection": "close"}
    )


async def in_time(coming: Coroutine[Any, Any, Coming], seconds: float) -> Coming:
    """A body, or a part of one; raises `ApiError` (408) where it does not come in time."""
    try:
        return await asyncio.wait_for(coming, seconds)
    except asyncio.TimeoutError:
        message = f"the body did not come within {seconds:g} s; send it faster"
        raise ApiError(408, message, "too_slow", headers={"connection": "close"}) from None


def _counted(receive: Receive, limit: int, seconds: float) -> Receive:
    """A body as it comes, each part of it in time; one that is too long ends as in `whole_body`."""
    size, is_more = 0, True

    async def counted() -> Message:
        nonlocal size, is_more
        if not is_more:
            return await receive()
        message = await in_time(_part(receive), seconds)
        size, is_more = size + len(message.get("body", b"")), message.get("more_body", False)
        if size > limit:
            if is_more:
                with contextlib.suppress(ApiError):
                    await in_time(whole_body(receive, 0), seconds)
            raise _too_long(limit)
        return message

    return counted


async def _part(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ApiError(400, "the client hung up", "gone")
    return message


async def whole_body(receive: Receive, limit: int) -> bytes:
    """The body. One that is too long is read on for a while, and not kept, so that who sends before reading sees the answer."""
    parts: list[bytes] = []
    size, is_more = 0, True
    while is_more and size <= limit + MAX_DISCARDED_BYTES:
        message = await _part(receive)
        part, is_more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        raise _too_long(limit)
    return b"".join(parts)
