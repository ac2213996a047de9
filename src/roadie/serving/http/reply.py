"""Answers that take a while: given up when the caller hangs up or waits too long; nothing goes on behind them."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from roadie.serving.http.failures import SERVER, ApiError, as_api_error, dumped
from roadie.serving.http.flow import Flow

DONE = b"data: [DONE]\n\n"


class Reply(Response):
    """An answer made from a flow, which is closed with it."""

    def __init__(self, flow: Flow, timeout_s: float) -> None:
        super().__init__()
        self._flow, self._timeout_s = flow, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the answer; an error before its first byte is an answer of its own."""
        work, gone = (
            asyncio.ensure_future(self._guarded(scope, receive, send)),
            asyncio.ensure_future(hung_up(receive)),
        )
        try:
            done, _ = await asyncio.wait({work, gone}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                work.cancel()
                await asyncio.wait({work})
                await self._fail(_took_too_long(self._timeout_s), scope, receive, send)
        finally:
            self._flow.close()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._work(scope, receive, send)
        except Exception as error:
            await self._fail(as_api_error(error), scope, receive, send)

    @abstractmethod
    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        await error.response()(scope, receive, send)


class WholeReply(Reply):
    """One JSON object, when all is there."""

    def __init__(self, flow: Flow, answer: Awaitable[dict[str, Any]], timeout_s: float) -> None:
        super().__init__(flow, timeout_s)
        self._answer = answer

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = dumped(await self._answer)
        await Response(body, media_type="application/json")(scope, receive, send)


class StreamReply(Reply):
    """Server-sent events, the first when there is something to tell; an error after it is the last event, without [DONE]."""

    def __init__(self, flow: Flow, events: AsyncIterator[dict[str, Any]], timeout_s: float) -> None:
        super().__init__(flow, timeout_s)
        self._events = events
        self._has_started = False

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for event in self._events:
            await self._start(send)
            await send({"type": "http.response.body", "body": _event(event), "more_body": True})
        await self._start(send)
        await send({"type": "http.response.body", "body": DONE})

    async def _start(self, send: Send) -> None:
        if not self._has_started:
            self._has_started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._has_started:
            await send({"type": "http.response.body", "body": _event(error.body)})
        else:
            await super()._fail(error, scope, receive, send)


def _event(value: dict[str, Any]) -> bytes:
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {dumped(value)}\n\n".encode()


async def hung_up(receive: Receive) -> None:
    """Returns when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _took_too_long(timeout_s: float) -> ApiError:
    message = f"the request took more than {timeout_s:g} s; ask for less, or come back when less is going on"
    return ApiError(504, message, "timeout", SERVER)
