"""The server that clients talk to: the embedded model with three adapters, and a chat template that shows tools to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import BaseModel, Field
from tests.serving.http.harness import Running, running
from tests.serving.http.test_tools import template
from tests.versions import NO_ENGINE, installed

from roadie import embedded
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry

collect_ignore_glob = ["test_*.py"] if NO_ENGINE or installed("llguidance") is None else []


class Turtle(BaseModel):
    """A turtle that a model knows of; every answer that is one is short."""

    name: str = Field(description="What it is called.", max_length=12)
    legs: int = Field(ge=0, le=8)
    kind: str = Field(pattern="^(sea|land)$")
    friends: list[Annotated[str, Field(max_length=8)]] = Field(max_length=2, description="Others.")


TURNS = [{"role": "user", "content": "Tell me of a turtle."}]


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    tokenizer.chat_template = template("hermes")
    settings = EngineSettings(num_slots=4, num_blocks=512, max_batch_tokens=256, max_running=32)
    engine = ContinuousBatchingEngine(model, tokenizer, Registry.open(embedded.adapters_path()), settings)
    with running(engine, tokenizer=tokenizer) as found:
        yield found


@pytest.fixture
def url(server: Running) -> str:
    return f"{server.url}/v1"
