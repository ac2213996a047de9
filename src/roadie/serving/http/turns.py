"""A conversation as a chat template knows it.

Templates differ in what they take, which their own text tells:

a developer's words     those of the system, where the template has no such role: most leave out a role that they do not know
ids of calls            nine letters and digits each for Mistral's, which take no others
several calls a turn    a turn each for Llama 3's, which take one; what its tool said follows each
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from roadie.serving.http.bodies import Message
from roadie.serving.http.tool_bodies import ToolCall
from roadie.serving.http.tools import STYLES, takes_one_call

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def turns_of(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Messages for a template: arguments of calls are objects, and what a tool says has the tool's name."""
    roles = {} if "developer" in template else {"developer": "system"}
    has_short_ids = STYLES["mistral"].opener in template
    turns: list[dict[str, Any]] = []
    names: dict[str | None, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": roles.get(message.role, message.role), "content": message.text}
        if message.tool_calls:
            turn["tool_calls"] = [_call(call, has_short_ids) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
        is_tool = message.role == "tool"
        name = message.name or (names.get(message.tool_call_id) if is_tool else None)
        call_id = _id(message.tool_call_id, has_short_ids) if is_tool else message.tool_call_id
        turns.append(turn | {key: value for key, value in (("name", name), ("tool_call_id", call_id)) if value})
    return list(_parted(turns)) if takes_one_call(template) else turns


def _call(call: ToolCall, has_short_ids: bool) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"id": _id(call.id, has_short_ids), "type": "function", "function": function}


def _id(given: str | None, is_short: bool) -> str | None:
    """The id that a call or an answer to it has in the prompt: the same for the same id."""
    if not is_short or _SHORT_ID.fullmatch(given or ""):
        return given
    return hashlib.sha256((given or "").encode()).hexdigest()[:9]


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text


def _parted(turns: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The turns, those of several calls in as many; what the tools said stands behind the call that it answers."""
    waiting: list[dict[str, Any]] = []  # calls whose answers come next
    for turn in turns:
        if turn["role"] == "tool":
            answered = next((each for each in waiting if each["tool_calls"][0]["id"] == turn.get("tool_call_id")), None)
            if answered is not None:
                waiting.remove(answered)
                yield answered
        else:
            yield from waiting
            calls = turn.get("tool_calls", ())
            waiting = [
                turn | {"tool_calls": [call], "content": "" if place else turn["content"]}
                for place, call in enumerate(calls)
            ]
            if calls:
                continue
        yield turn
    yield from waiting
