"""The openai client: `parse()`, tools made of classes, and how many of the answers are valid."""

from __future__ import annotations

import openai
from tests.serving.clients.conftest import TURNS, Turtle
from tests.serving.http.harness import Running


def test_two_hundred_answers_of_two_hundred_are_valid(server: Running) -> None:
    client, answers = server.openai(), []
    for seed, model in enumerate(("base", "turtle", "topics", "turtle=2", "base:turtle=0.5+asyncio=0.5")):
        done = client.chat.completions.parse(model=model, messages=TURNS, response_format=Turtle, n=20, seed=100 * seed)
        answers += [choice.message.parsed for choice in done.choices]
        tool = openai.pydantic_function_tool(Turtle)
        done = client.chat.completions.parse(
            model=model,
            messages=TURNS,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            n=20,
            seed=100 * seed,
        )
        answers += [choice.message.tool_calls[0].function.parsed_arguments for choice in done.choices]
    assert len(answers) == 200
    assert all(isinstance(answer, Turtle) for answer in answers)
    assert len({answer.model_dump_json() for answer in answers}) > 150, "they would be valid if all were the same"


def test_a_stream_is_parsed_as_it_comes(server: Running) -> None:
    client = server.openai()
    with client.chat.completions.stream(model="turtle", messages=TURNS, response_format=Turtle, seed=1) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Turtle)
    assert {"chunk", "content.delta", "content.done"} <= kinds
    tools = {"tools": [openai.pydantic_function_tool(Turtle)], "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(model="turtle", messages=TURNS, seed=1, **tools) as stream:
        kinds = {event.type for event in stream}
        (*_, called) = stream.get_final_completion().choices[0].message.tool_calls
        assert isinstance(called.function.parsed_arguments, Turtle)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
