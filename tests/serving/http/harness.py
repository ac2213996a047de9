"""What the tests of the HTTP side share: a server in a thread, on a free port, and keys for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from tests.patience import HANG_S
from tests.serving.http.fake_engine import FakeEngine

from roadie import embedded
from roadie.serving.engine import Engine
from roadie.serving.http.app import make_service
from roadie.serving.http.extensions import Extension
from roadie.serving.http.keys import Caller, Keys, hash_key
from roadie.serving.http.server import Server, bind
from roadie.serving.http.service import Service
from roadie.serving.http.settings import HttpSettings

ADMIN_KEY, USER_KEY, LEGAL_KEY = "admin-" + "a" * 32, "user-" + "u" * 32, "legal-" + "l" * 32
KEYS = Keys(
    (
        (hash_key(ADMIN_KEY), Caller("operator", None, is_admin=True)),
        (hash_key(USER_KEY), Caller("alice")),
        (hash_key(LEGAL_KEY), Caller("lawyer", ("legal", "law-*"))),
    )
)


@dataclass(frozen=True)
class Running:
    """A server that runs. Its clients do not try again, so that tests see every refusal."""

    url: str
    engine: Any
    service: Service
    server: Server
    closing: ExitStack

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def http(self, key: str | None = None) -> httpx2.Client:
        """A plain client, closed with the server."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = httpx2.Client(base_url=self.url, headers=headers, timeout=HANG_S, trust_env=False)
        return self.closing.enter_context(client)

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The official client, closed with the server."""
        client = self.closing.enter_context(httpx2.Client(trust_env=False, timeout=HANG_S))
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=client)

    def connect(self, **options: Any) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(self.address, timeout=HANG_S, **options)


@contextmanager
def running(
    engine: Engine | None = None,
    settings: HttpSettings | None = None,
    keys: Keys | None = None,
    tokenizer: Any = None,
    extensions: Sequence[Extension] = (),
) -> Iterator[Running]:
    """A server over an engine (a fake one where none is given), stopped in good order afterwards."""
    engine = engine if engine is not None else FakeEngine()
    bound = bind("127.0.0.1", 0)
    tokenizer = tokenizer if tokenizer is not None else embedded.load_tokenizer()
    service = make_service(engine, tokenizer, settings or HttpSettings(), keys, extensions)
    service.start()
    ready = threading.Event()
    server = Server(service, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert ready.wait(HANG_S)
    try:
        with ExitStack() as closing:
            yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", engine, service, server, closing)
    finally:
        server.end()
        thread.join(HANG_S)
        service.stop()
        assert not thread.is_alive(), "the server did not end"


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
