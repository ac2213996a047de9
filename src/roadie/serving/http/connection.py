"""One connection: uvicorn's, and a limit to the patience with whoever is at its other end.

    header    not there in time: 408, and the connection is closed
    answer    nothing of it taken for too long: the connection is cut, which cancels the request
    idle      closed after a while, whether or not the rest of the last answer was taken

uvicorn has the last alone, and answers bad HTTP and too many connections in plain text; here they are JSON, as all errors.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from roadie.serving.http.failures import SERVER, ApiError
from roadie.serving.http.settings import HttpSettings

_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


def patient_protocol(settings: HttpSettings) -> type[asyncio.Protocol]:
    """The class of connections with these limits, for uvicorn's `http`."""

    class Configured(PatientProtocol):
        """With the limits of one server."""

        limits = settings

    return Configured


class PatientProtocol(H11Protocol):
    """See the module."""

    limits: HttpSettings

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience = _Patience(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                ApiError(503, "too many connections; come back later", "too_many_connections", SERVER, None, 1)
            )
            return
        self._await_header()

    def data_received(self, data: bytes) -> None:
        """Something came of a request."""
        if self.transport.is_closing():
            return
        before = self.cycle
        if self._is_between_requests:
            self._await_header()
        super().data_received(data)
        if self.cycle is not before:
            self._patience.end("header")

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_header(self) -> None:
        self._patience.begin("header", self.limits.header_timeout_s, self._header_is_late)

    def _header_is_late(self) -> None:
        if not self.transport.is_closing() and self._is_between_requests:
            self._refuse(ApiError(408, "the header of a request did not come in time", "too_slow"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, and close."""
        response = error.response()
        body = bytes(response.body)
        lines = [f"HTTP/1.1 {error.status} {_PHRASES[error.status]}", "connection: close"]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in response.raw_headers]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(ApiError(400, "got something that is not HTTP/1.1; wanted a request", "invalid_http"))

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._patience.begin("answer", self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._patience.end("answer")

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for a while after an answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._patience.close()
        super().connection_lost(exc)


@dataclass
class _Patience:
    """Timers by name, each running once."""

    loop: asyncio.AbstractEventLoop

    def __post_init__(self) -> None:
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def begin(self, name: str, seconds: float, action: Any) -> None:
        """Start a timer, unless it runs."""
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self._fire, name, action)

    def _fire(self, name: str, action: Any) -> None:
        self._timers.pop(name, None)
        action()

    def end(self, name: str) -> None:
        """Stop a timer, if it runs."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop them all."""
        for name in list(self._timers):
            self.end(name)
