"""Running it: one process, one event loop, and an end in good order.

SIGTERM, SIGINT    no new requests are taken (503, and /ready says so); those accepted are answered, for drain_timeout_s at
                   most; then the engine is stopped. Twice: at once.
SIGHUP             the API keys are read again; a file that cannot be used changes nothing
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from roadie.errors import ConfigError
from roadie.serving.http.app import make_app
from roadie.serving.http.connection import patient_protocol
from roadie.serving.http.keys import Keys
from roadie.serving.http.service import Service

_log = logging.getLogger("roadie.serving.http")
BACKLOG = 1024
_WANTED_FILES = 65536


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet; port 0: any free one. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # said, so that asyncio sees it and sets TCP_NODELAY
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"got host {host!r} and port {port} ({reason}); wanted an address that is free") from None
    return bound


def serve(
    service: Service,
    bound: socket.socket,
    *,
    read_keys_again: Callable[[], Keys] | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> bool:
    """Serve until a signal says otherwise; the engine has been started, and is stopped here. Whether every request was answered.

    read_keys_again: for SIGHUP. on_ready: called once connections are taken.
    """
    _allow_many_files()
    disable_created_metrics()  # a second series for each, which says when it began
    server = Server(service, read_keys_again, on_ready)
    try:
        server.run(sockets=[bound])
    finally:
        service.stop()
    return server.has_answered_all


def _uvicorn_config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        http=patient_protocol(service.settings),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(service.settings.keep_alive_s)),
        timeout_graceful_shutdown=5,
    )


def _allow_many_files() -> None:
    """A connection takes a file; the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """uvicorn's server with signals of its own, and an end that waits for what was accepted."""

    def __init__(
        self,
        service: Service,
        read_keys_again: Callable[[], Keys] | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(_uvicorn_config(service))
        self._service, self._read_keys_again, self._on_ready = service, read_keys_again, on_ready
        self.has_answered_all = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handlers on the loop, which end this server and raise nothing afterwards."""
        loop = asyncio.get_running_loop()
        handled: list[int] = []
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            for number, handler in self._handlers():
                loop.add_signal_handler(number, handler)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _handlers(self) -> list[tuple[int, Callable[[], None]]]:
        return [(signal.SIGTERM, self.end), (signal.SIGINT, self.end), (signal.SIGHUP, self.renew_keys)]

    def end(self) -> None:
        """Stop in good order; called twice, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def renew_keys(self) -> None:
        if self._read_keys_again is None:
            return
        try:
            self._service.gate.keys = self._read_keys_again()
            _log.warning("the API keys were read again")
        except ConfigError as error:
            _log.error("the API keys stay as they were: %s", error)

    async def startup(self, sockets: Any = None) -> None:
        """Connections are taken from now on."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer what was accepted, still listening, so that whoever asks is told; then close."""
        if not self.force_exit:
            await self._drain()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        gate, seconds = self._service.gate, self._service.settings.drain_timeout_s
        _log.warning("stopping: %d requests are being answered", gate.num_inside)
        give_up_s = time.monotonic() + seconds
        gate.is_open = False
        while gate.num_inside and time.monotonic() < give_up_s and not self.force_exit:
            await gate.wait(min(0.1, give_up_s - time.monotonic()))
        self.has_answered_all = not gate.num_inside
        if not self.has_answered_all:
            _log.error("%d requests were not answered within %g s and are given up", gate.num_inside, seconds)
        await asyncio.get_running_loop().run_in_executor(None, self._service.engine.stop)
