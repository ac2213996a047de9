"""What the official client is to get from any server of roadie, wherever it runs: given as a base URL and two keys."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2
import openai
import pytest
from tests.patience import HANG_S

TURNS = [{"role": "user", "content": "What is an event loop?"}]
GREEDY = {"max_tokens": 6, "temperature": 0}


@dataclass(frozen=True)
class Served:
    """A server: where, a key that may generate alone, its base model, two adapters, and the tokens of its context."""

    url: str
    key: str
    base: str
    adapters: tuple[str, str]
    max_context_tokens: int = 512

    def client(self, key: str | None = None) -> openai.OpenAI:
        http = httpx2.Client(trust_env=False, timeout=HANG_S)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, http_client=http)


def exercise(server: Served) -> None:
    """Lists, completes, blends, chats, streams, and is told what is wrong."""
    with server.client() as client:
        lists(client, server)
        completes(client, server)
        blends(client, server)
        chats_and_streams(client, server)
        raises_its_own_errors(client, server)


def lists(client: openai.OpenAI, server: Served) -> None:
    models = {model.id: model.model_extra["parent"] for model in client.models.list()}
    assert models[server.base] is None
    assert {models[name] for name in server.adapters} == {server.base}
    assert client.models.retrieve(server.adapters[0]).id == server.adapters[0]


def completes(client: openai.OpenAI, server: Served) -> None:
    for model in (server.base, "base", *server.adapters):
        done = client.completions.create(model=model, prompt="The turtle", **GREEDY, extra_body={"ignore_eos": True})
        assert (done.model, done.choices[0].finish_reason, done.usage.completion_tokens) == (model, "length", 6)
        parts = client.completions.create(
            model=model, prompt="The turtle", **GREEDY, stream=True, extra_body={"ignore_eos": True}
        )
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    several = client.completions.create(model="base", prompt=["a b", "a"], n=2, seed=7, max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def blends(client: openai.OpenAI, server: Served) -> None:
    first, second = server.adapters
    weights = {"adapters": {first: 0.7, second: 0.3}}
    one = client.completions.create(model="base", prompt="The turtle", **GREEDY, extra_body=weights)
    other = client.completions.create(model=f"base:{first}=0.7+{second}=0.3", prompt="The turtle", **GREEDY)
    assert one.choices[0].text == other.choices[0].text


def chats_and_streams(client: openai.OpenAI, server: Served) -> None:
    asked = {"model": server.adapters[0], "messages": TURNS, "max_tokens": 8, "seed": 1}
    chat = client.chat.completions.create(**asked)
    assert chat.choices[0].message.role == "assistant"
    *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content or "" for part in parts) == chat.choices[0].message.content
    assert last.usage.total_tokens == chat.usage.total_tokens
    turns = [*TURNS, chat.choices[0].message, *TURNS]
    again = client.chat.completions.create(model=server.adapters[0], messages=turns, max_tokens=1, n=2)
    assert len(again.choices) == 2


def raises_its_own_errors(client: openai.OpenAI, server: Served) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
            client.completions.create(model="nobody", prompt="a", stream=stream)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt="a", max_tokens=server.max_context_tokens)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError), server.client("wrong") as stranger:
        stranger.models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "x"}, cast_to=object)
