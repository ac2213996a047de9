"""Sending a workload and noting when its tokens come.

Time counts from when a request should have been sent: a client that falls behind does not make a server look better.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from roadie.errors import ServingError
from roadie.traffic.workload import Arrival

CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Target:
    """A server. url: without `/v1`. key: its API key. has_extras: whether it takes `ignore_eos`, as roadie and vLLM do.

    max_at_once: requests in flight; more wait here. timeout_s: of one request.
    """

    url: str
    key: str | None = None
    has_extras: bool = True
    max_at_once: int = 64
    timeout_s: float = 600.0

    def client(self) -> httpx2.AsyncClient:
        """A client of this server that goes through no proxy."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.max_at_once, max_keepalive_connections=self.max_at_once)
        timeout = httpx2.Timeout(self.timeout_s, connect=CONNECT_TIMEOUT_S)
        return httpx2.AsyncClient(
            base_url=self.url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            limits=limits,
            timeout=timeout,
            trust_env=False,
        )


@dataclass(frozen=True)
class Answer:
    """What became of a request; times in seconds since the beginning of all. token_times_s: of each event with text.

    due_s: when it should have been sent. error: why it failed, None where it did not.
    """

    arrival: Arrival
    due_s: float
    sent_s: float
    end_s: float
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


async def models_of(target: Target) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The base models and the adapters of a server. Raises `ServingError` where it does not answer."""
    try:
        async with target.client() as client:
            response = await client.get("/v1/models")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServingError(
            f"got no answer of {target.url!r} ({error}); wanted a server; start it, or check --url"
        ) from None
    if response.status_code != 200:
        raise ServingError(f"got status {response.status_code} of {target.url}/v1/models: {response.text[:300]}")
    models = response.json()["data"]
    base = tuple(model["id"] for model in models if not model.get("parent"))
    return base, tuple(model["id"] for model in models if model.get("parent"))


async def drive(
    target: Target, arrivals: Sequence[Arrival], on_answer: Callable[[Answer], None] = lambda answer: None
) -> tuple[Answer, ...]:
    """Send all requests, each at its time, and wait for their answers; `on_answer` is told of each when it has come."""

    async def answered(arrival: Arrival) -> Answer:
        answer = await sender.send(arrival)
        on_answer(answer)
        return answer

    room = asyncio.Semaphore(target.max_at_once)
    async with target.client() as client:
        began_s = time.perf_counter()
        sender = _Sender(target, client, room, began_s)
        return tuple(await asyncio.gather(*map(answered, arrivals)))


@dataclass
class _Progress:
    """What has come of one answer."""

    token_times_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sender:
    target: Target
    client: httpx2.AsyncClient
    room: asyncio.Semaphore
    began_s: float

    def _now_s(self) -> float:
        return time.perf_counter() - self.began_s

    async def send(self, arrival: Arrival) -> Answer:
        await asyncio.sleep(max(0.0, arrival.at_s - self._now_s()))
        async with self.room:
            sent_s = self._now_s()
            due_s = arrival.at_s if arrival.at_s > 0 else sent_s
            progress, error = _Progress(), None
            try:
                await self._receive(arrival, progress)
            except (httpx2.HTTPError, ServingError, ValueError, KeyError) as problem:
                error = f"{type(problem).__name__}: {problem}"[:300]
            usage = progress.usage
            return Answer(
                arrival,
                due_s,
                sent_s,
                self._now_s(),
                tuple(progress.token_times_s),
                usage.get("prompt_tokens", 0),
                usage.get("completion_tokens", len(progress.token_times_s)),
                error,
            )

    async def _receive(self, arrival: Arrival, progress: _Progress) -> None:
        body: dict[str, Any] = {"model": arrival.model, "prompt": arrival.prompt, "max_tokens": arrival.max_tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        if self.target.has_extras:
            body["ignore_eos"] = True
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ServingError(
                    f"status {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                )
            async for event in _events(response):
                if event.get("error"):
                    raise ServingError(str(event["error"].get("message")))
                if event.get("usage"):
                    progress.usage = event["usage"]
                if any(choice.get("text") for choice in event.get("choices", ())):
                    progress.token_times_s.append(self._now_s())


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and line != "data: [DONE]":
            yield json.loads(line[len("data:") :])
