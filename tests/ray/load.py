"""Clients that never stop asking, and what they were answered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2
from tests.patience import HANG_S
from tests.ray.cluster import Cluster

TOKENS = 24


@dataclass(frozen=True)
class Asked:
    model: str
    prompt: str
    is_streamed: bool


@dataclass(frozen=True)
class Answer:
    """What came of a request: text, or what went wrong. begun: something of it had come."""

    asked: Asked
    began_s: float
    ended_s: float
    text: str | None
    problem: str = ""
    has_begun: bool = False


@dataclass
class Load:
    """The answers so far."""

    answers: list[Answer] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, count: int) -> None:
        """Until so many more answers have come."""
        goal, give_up_s = len(self.answers) + count, time.monotonic() + HANG_S
        while len(self.answers) < goal:
            assert time.monotonic() < give_up_s, "the answers did not come"
            time.sleep(0.02)


@contextmanager
def under_load(cluster: Cluster, models: Sequence[str], prompts: Sequence[str], num_clients: int = 6) -> Iterator[Load]:
    """Clients, half of which stream, until the block ends; then each has had its last answer."""
    load = Load()

    def client(number: int) -> None:
        with cluster.http() as http:
            turn = number
            while not load.over.is_set():
                asked = Asked(models[turn % len(models)], prompts[turn // 2 % len(prompts)], number % 2 == 0)
                load.answers.append(ask(http, asked))
                turn += 1

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(client, number) for number in range(num_clients)]
        try:
            yield load
        finally:
            load.over.set()
            for each in clients:
                each.result()


@dataclass
class Begun:
    """Whether something of an answer has come."""

    on_begin: Callable[[], object]
    is_so: bool = False

    def note(self) -> None:
        if not self.is_so:
            self.is_so = True
            self.on_begin()


def ask(
    http: httpx2.Client, asked: Asked, num_tokens: int = TOKENS, on_begin: Callable[[], object] = lambda: None
) -> Answer:
    body = {
        "model": asked.model,
        "prompt": asked.prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    began_s, has_begun = time.monotonic(), Begun(on_begin)
    try:
        text = (streamed if asked.is_streamed else whole)(http, body, has_begun)
        return Answer(asked, began_s, time.monotonic(), text, has_begun=has_begun.is_so)
    except (httpx2.HTTPError, ValueError) as error:
        return Answer(asked, began_s, time.monotonic(), None, repr(error), has_begun.is_so)


def whole(http: httpx2.Client, body: dict[str, object], has_begun: Begun) -> str:
    answer = http.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise ValueError(f"{answer.status_code} {answer.text}")
    return answer.json()["choices"][0]["text"]


def streamed(http: httpx2.Client, body: dict[str, object], has_begun: Begun) -> str:
    parts, last = [], ""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {answer.read()!r}")
        for line in answer.iter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                has_begun.note()
                event = json.loads(last)
                if "error" in event:
                    raise ValueError(f"error in mid stream: {event['error']}")
                parts.append(event["choices"][0]["text"])
    if last != "[DONE]":
        raise ValueError("the stream ended without [DONE]")
    return "".join(parts)
