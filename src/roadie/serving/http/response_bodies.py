"""What callers send to `/v1/responses`, and the chat that it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, Tag

from roadie.bank.blends import MAX_BLEND
from roadie.serving.http.bodies import MAX_TOKEN_ID, ChatBody, Message, Name, Strength
from roadie.serving.http.failures import ApiError
from roadie.serving.http.fields import (
    LIST,
    TEXT,
    Body,
    Label,
    Lacks,
    NoEntries,
    NoItems,
    Off,
    Said,
    StreamOptions,
    Text,
    Unasked,
    Zero,
    is_list,
    is_text,
    one_of,
    refusal_as_text,
)
from roadie.serving.http.formats import JsonSchema, ResponseFormat
from roadie.serving.http.tool_bodies import (
    AllowedChoice,
    AllowedTools,
    CalledFunction,
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
    ToolName,
)

_MEMORY = Lacks("memory of responses; send what was said in input")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


class InputPart(Said):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


Parts: TypeAlias = Annotated[
    Annotated[Text, TEXT] | Annotated[list[Annotated[InputPart, BeforeValidator(refusal_as_text)]], LIST],
    one_of("a text or a list of parts", text=is_text, list=is_list),
]


class InputItem(Said):
    """A message, a call that the model made, what a tool said to it, or reasoning, which is left out."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Parts | None = None
    call_id: Label | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: Parts | None = None


class FlatTool(Body):
    """A tool: its fields are not within `function`, as those of chats are."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(NamedFunction):
    """The tool that is to be called."""

    type: Literal["function"]

    @property
    def as_chat(self) -> NamedTool:
        """As chats have it."""
        return NamedTool(type="function", function=NamedFunction(name=self.name))


class FlatAllowed(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatNamedTool], Field(min_length=1, max_length=128)]

    @property
    def as_chat(self) -> AllowedChoice:
        """As chats have it."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.as_chat for tool in self.tools])
        return AllowedChoice(type="allowed_tools", allowed_tools=allowed)


class TextFormat(JsonSchema):
    """What the answer is to be: as `response_format` of chats, without a level."""

    type: Literal["text", "json_object", "json_schema"]
    name: Label = "answer"


class TextOptions(Body):
    """How text comes."""

    format: TextFormat | None = None
    verbosity: Annotated[Literal["medium"] | None, Lacks("levels of verbosity")] = None


class Reasoning(Body):
    """There is none."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponsesBody(Unasked):
    """`POST /v1/responses`."""

    model: Annotated[Text, Field(min_length=1, max_length=4096)]
    adapters: Annotated[dict[Name, Strength], Field(max_length=MAX_BLEND)] | None = None
    input: Annotated[
        Annotated[Text, TEXT] | Annotated[list[InputItem], Field(min_length=1, max_length=4095), LIST],
        one_of("a text or a list of items", text=is_text, list=is_list),
    ]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], TEXT]
            | Annotated[FlatAllowed, Tag("(allowed)")]
            | Annotated[FlatNamedTool, LIST],
            one_of(
                "none, auto, required, a tool by its name or allowed_tools",
                text=is_text,
                allowed=lambda value: _is_object(value) and value.get("type") == "allowed_tools",
                list=_is_object,
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    previous_response_id: Annotated[None, _MEMORY] = None
    conversation: Annotated[None, _MEMORY] = None
    background: Annotated[Off, Lacks("work in the background")] = None
    include: Annotated[NoItems, Lacks("more to include")] = None
    prompt: Annotated[None, Lacks("stored prompts")] = None
    reasoning: Annotated[Reasoning | None, Lacks("levels of reasoning")] = None
    truncation: Annotated[Literal["disabled"] | None, Lacks("truncation of prompts")] = None
    top_logprobs: Annotated[Zero, Lacks("logprobs in responses; chats have them")] = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    """Of OpenAI's own tools, of which there are none."""
    context_management: Annotated[NoItems, Lacks("compaction of conversations")] = None
    background_options: Annotated[NoEntries, Lacks("work in the background")] = None
    access_programs: Annotated[NoEntries, Lacks("programs of access")] = None
    image: Annotated[NoEntries, Lacks("images")] = None

    def as_chat(self) -> ChatBody:
        """The chat that is asked for. Raises `ApiError`."""
        return ChatBody(
            model=self.model,
            messages=list(self._messages()),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            tools=None if self.tools is None else [_tool(tool) for tool in self.tools],
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._format(),
        )

    def _choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.as_chat

    def _format(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None:
            return None
        return ResponseFormat(type=asked.type, json_schema=asked if asked.type == "json_schema" else None)

    def _messages(self) -> list[Message]:
        said = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*said, Message(role="user", content=self.input)]
        for place, item in enumerate(self.input):
            message = None if item.type == "reasoning" else _message(item, place)
            if message is not None and message.tool_calls and said and said[-1].tool_calls:
                said[-1].tool_calls.extend(message.tool_calls)  # calls of one turn, which chats have in one message
            elif message is not None:
                said.append(message)
        return said

    @property
    def echoed(self) -> dict[str, Any]:
        """What of a request its answer has, too."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "text": {"format": self._format_told()},
            "tool_choice": choice or "auto" if isinstance(choice, str | None) else choice.model_dump(exclude_none=True),
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "truncation": "disabled",
            "user": self.user,
        }

    def _format_told(self) -> dict[str, Any]:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type != "json_schema":
            return {"type": "text" if asked is None else asked.type}
        return asked.model_dump(by_alias=True)


def _tool(tool: FlatTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters)
    return Tool(type="function", function=function)


def _message(item: InputItem, place: int) -> Message:
    """A message of a chat. Raises `ApiError` for an item without what its kind needs."""
    needs = {"message": ("role", "content"), "function_call": ("call_id", "name", "arguments")}
    for name in needs.get(item.type, ("call_id", "output")):
        if getattr(item, name) is None:
            param = f"input.{place}.{name}"
            raise ApiError(400, f"{param}: Field required", "missing_parameter", param=param)
    if item.type == "message":
        assert item.role is not None
        return Message(role=item.role, content=_text(item.content))
    if item.type == "function_call_output":
        return Message(role="tool", content=_text(item.output), tool_call_id=item.call_id)
    function = CalledFunction(name=item.name or "", arguments=item.arguments or "{}")
    return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, function=function)])


def _text(parts: str | list[InputPart] | None) -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts or ())
