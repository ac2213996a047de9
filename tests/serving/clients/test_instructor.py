"""instructor: an answer of a class, by a tool and by a schema."""

from __future__ import annotations

import pytest
from tests.serving.clients.conftest import TURNS, Turtle
from tests.serving.http.harness import Running

instructor = pytest.importorskip("instructor")
ONE_CALL = {"TOOLS": {"parallel_tool_calls": False}, "JSON_SCHEMA": {}}  # a model this small calls until it is stopped


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_is_of_its_class_at_the_first_try(server: Running, mode: str) -> None:
    client = instructor.from_openai(server.openai(), mode=instructor.Mode[mode])
    for seed in range(8):
        found = client.chat.completions.create(
            model="turtle", messages=TURNS, response_model=Turtle, max_retries=0, seed=seed, **ONE_CALL[mode]
        )
        assert isinstance(found, Turtle)


def test_parts_of_an_answer_come_as_they_are_made(server: Running) -> None:
    client = instructor.from_openai(server.openai(), mode=instructor.Mode.TOOLS)
    asked = {"model": "turtle", "messages": TURNS, "response_model": Turtle, "seed": 1, **ONE_CALL["TOOLS"]}
    parts = list(client.chat.completions.create_partial(**asked))
    assert len(parts) > 2
    Turtle.model_validate(parts[-1].model_dump())
