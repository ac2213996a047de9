"""Tools as callers send them: those that are offered, which of them may or must be called, and calls that were made."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag

from roadie.serving.http.fields import LIST, TEXT, Body, Label, Lacks, Said, Text, is_text, one_of


class CalledFunction(Said):
    """A tool's name, and its arguments as a text of JSON."""

    name: Text
    arguments: Text = "{}"


class ToolCall(Said):
    """A call that an assistant made."""

    type: Annotated[Literal["function"] | None, Lacks("tools but functions")] = None
    id: Label | None = None
    function: CalledFunction


ToolName: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Body):
    """What a tool is called, what it does, and a JSON schema of its parameters."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Taken, and not used: calls that are forced are valid, others are as the model makes them."""


class Tool(Body):
    """Something that the model may have called."""

    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """As chat templates take it, which look for a description and for properties."""
        parameters = {"type": "object", "properties": {}, **(self.function.parameters or {})}
        described = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": parameters,
        }
        return {"type": "function", "function": described}


class NamedFunction(Body):
    """One of the tools."""

    name: Text


class NamedTool(Body):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedChoice(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _is_named(value: Any) -> bool:
    return isinstance(value, (dict, NamedTool))


def _is_allowed(value: Any) -> bool:
    return isinstance(value, AllowedChoice) or (isinstance(value, dict) and value.get("type") == "allowed_tools")


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], TEXT]
    | Annotated[AllowedChoice, Tag("(allowed)")]
    | Annotated[NamedTool, LIST],
    one_of(
        "none, auto, required, a tool by its name or allowed_tools", text=is_text, allowed=_is_allowed, list=_is_named
    ),
]
