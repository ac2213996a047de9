"""LangChain: `with_structured_output` by each of its methods that constrain, and `bind_tools`."""

from __future__ import annotations

import pytest
from tests.serving.clients.conftest import Turtle

pytest.importorskip("langchain_openai")
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def chat(url: str, seed: int = 0) -> ChatOpenAI:
    return ChatOpenAI(model="turtle", base_url=url, api_key="none", max_retries=0, seed=seed)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_of_its_class(url: str, method: str) -> None:
    for seed in range(8):
        assert isinstance(chat(url, seed).with_structured_output(Turtle, method=method).invoke("A turtle?"), Turtle)


def test_bound_tools_are_called_and_their_answers_are_read(url: str) -> None:
    bound = chat(url).bind_tools([Turtle], tool_choice="any", parallel_tool_calls=False)
    said = bound.invoke("A turtle?")
    (called,) = said.tool_calls
    Turtle.model_validate(called["args"])
    turns = [HumanMessage("A turtle?"), said, ToolMessage("It is green.", tool_call_id=called["id"])]
    assert isinstance(chat(url).bind(max_tokens=8).invoke(turns), AIMessage)
    chunks = list(bound.stream("A turtle?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 2
    Turtle.model_validate(whole.tool_calls[0]["args"])
