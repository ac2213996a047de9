"""`POST /v1/responses`, without a memory: OpenAI's newer way to ask for one answer, made of the same parts as a chat.

Nothing is stored: what was said before comes with the request, in `input`. A stream and a whole answer are made in one way: the
answer is what the last event of the stream would have.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.http.answers import ResponseAnswer
from roadie.serving.http.conversation import Conversation, begin
from roadie.serving.http.reply import StreamReply, WholeReply
from roadie.serving.http.response_bodies import ResponsesBody
from roadie.serving.http.service import service_of

router = APIRouter()


@router.post("/v1/responses", response_model=ResponseAnswer, tags=["generation"], summary="Answer, without a memory")
async def respond(body: ResponsesBody, request: Request) -> Response:
    """Answer a text or a list of items; nothing of it is kept."""
    service = service_of(request)
    chat = body.as_chat()
    chat.check()
    call = service.begin("resp", body.model, body.adapters, request)
    writer = _Writer(body, await begin(chat, call, service))
    flow, wait_s = writer.found.flow, service.settings.request_timeout_s
    return StreamReply(flow, writer.events(), wait_s) if body.stream else WholeReply(flow, writer.whole(), wait_s)


@dataclass
class _Writer:
    """items: of the answer so far, the last of which may still grow."""

    body: ResponsesBody
    found: Conversation
    items: list[dict[str, Any]] = field(default_factory=list)
    is_open: bool = False
    num_events: int = 0

    async def whole(self) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async for event in self.events():
            last = event
        answer: dict[str, Any] = last["response"]
        return answer

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))
        (choice,) = self.found.choices
        async for _, output in self.found.flow.outputs():
            for delta in choice.take(output):
                for event in self._grown(delta):
                    yield event
        status = "incomplete" if choice.finish == "length" else "completed"
        for event in self._closed(status):
            yield event
        yield self._event(f"response.{status}", response=self._response(status))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.num_events += 1
        return {"type": kind, "sequence_number": self.num_events - 1, **fields}

    def _grown(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a piece of the answer adds, as a chat's stream has it."""
        if "content" in delta:
            yield from self._said(delta["content"])
        for part in delta.get("tool_calls", ()):
            yield from self._called(part)

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        if not self.is_open or self.items[-1]["type"] != "message":
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._opened({"type": "message", "role": "assistant", "content": []}, "msg")
            self.items[-1]["content"].append(content)
            yield self._event("response.content_part.added", **self._place(), content_index=0, part=dict(content))
        self.items[-1]["content"][0]["text"] += text
        yield self._event("response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[])

    def _called(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        function = part["function"]
        if "id" in part:
            item = {"type": "function_call", "call_id": part["id"], "name": function["name"], "arguments": ""}
            yield from self._opened(item, "fc")
        self.items[-1]["arguments"] += function["arguments"]
        if function["arguments"]:
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=function["arguments"])

    def _opened(self, item: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
        yield from self._closed("completed")
        self.items.append({"id": f"{kind}_{uuid.uuid4().hex}", "status": "in_progress", **item})
        self.is_open = True
        yield self._event("response.output_item.added", output_index=self._index, item=_copied(self.items[-1]))

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        if not self.is_open:
            return
        item, self.is_open = self.items[-1], False
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            place = {**self._place(), "content_index": 0}
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **place, part=dict(part))
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place(), **done)
        yield self._event("response.output_item.done", output_index=self._index, item=_copied(item))

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": self._index}

    def _response(self, status: str) -> dict[str, Any]:
        call, body, is_over = self.found.call, self.body, status != "in_progress"
        return {
            "id": call.id,
            "object": "response",
            "created_at": call.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": call.model,
            "output": [_copied(item) for item in self.items] if is_over else [],
            "usage": _usage(self.found.flow.totals.usage()) if is_over else None,
            "store": False,
            "previous_response_id": None,
            **body.echoed,
        }


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})


def _usage(of_chat: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": of_chat["prompt_tokens"],
        "input_tokens_details": dict(of_chat["prompt_tokens_details"]),
        "output_tokens": of_chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": of_chat["total_tokens"],
    }
