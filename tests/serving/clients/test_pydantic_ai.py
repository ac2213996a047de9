"""pydantic-ai: agents whose output is of a class, by a tool and by a schema, and agents that call tools."""

from __future__ import annotations

from contextlib import suppress

import pytest
from tests.serving.clients.conftest import Turtle

pydantic_ai = pytest.importorskip("pydantic_ai")
pytest.importorskip("pydantic_ai.models.openai")
from pydantic_ai import Agent, NativeOutput, ToolOutput, UsageLimitExceeded, UsageLimits  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402


def agent(url: str, **options: object) -> Agent:
    return Agent(OpenAIChatModel("turtle", provider=OpenAIProvider(base_url=url, api_key="none")), retries=0, **options)


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_output_is_of_its_class_at_the_first_try(url: str, kind: type) -> None:
    for seed in range(8):
        result = agent(url, output_type=kind(Turtle)).run_sync(
            "A turtle?", model_settings={"seed": seed, "parallel_tool_calls": False}
        )
        assert isinstance(result.output, Turtle)


def test_a_model_that_must_call_calls_a_tool_or_gives_its_output(url: str) -> None:
    asked: list[int] = []
    made, settled = agent(url, output_type=ToolOutput(Turtle)), []

    @made.tool_plain
    def legs(number: int) -> str:
        """How many legs there are."""
        asked.append(number)
        return "four"

    settings = {"parallel_tool_calls": False}
    for seed in range(6):
        with suppress(UsageLimitExceeded):  # where it called the tool, whose answer would be the next request
            limits = UsageLimits(request_limit=1)
            settled.append(
                made.run_sync("A turtle?", model_settings={"seed": seed, **settings}, usage_limits=limits).output
            )
    assert len(settled) + len(asked) == 6
    assert all(isinstance(output, Turtle) for output in settled)
