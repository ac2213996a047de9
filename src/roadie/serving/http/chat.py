"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.engine import Output, TokenLogprob
from roadie.serving.http.answers import Chat
from roadie.serving.http.bodies import ChatBody
from roadie.serving.http.conversation import Choice, Conversation, begin
from roadie.serving.http.pieces import Pieces, alternatives
from roadie.serving.http.reply import StreamReply, WholeReply
from roadie.serving.http.scores import prompt_logprobs_as_json
from roadie.serving.http.service import service_of

router = APIRouter()


@router.post("/v1/chat/completions", response_model=Chat, tags=["generation"], summary="Answer a conversation")
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation, n times, by the model's chat template, or as plain text where it has none."""
    service = service_of(request)
    body.check()
    call = service.begin("chatcmpl", body.model, body.adapters, request)
    found = await begin(body, call, service)
    writer, wait_s = _Writer(found, body, service.prompts.pieces), service.settings.request_timeout_s
    if body.stream:
        return StreamReply(found.flow, writer.events(), wait_s)
    return WholeReply(found.flow, writer.whole(), wait_s)


@dataclass(frozen=True)
class _Writer:
    found: Conversation
    body: ChatBody
    pieces: Pieces

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        call = self.found.call
        head = {"id": call.id, "object": kind, "created": call.created, "model": call.model}
        return {**head, "choices": choices, "usage": usage}

    async def whole(self) -> dict[str, Any]:
        scored: Sequence[TokenLogprob] = ()
        async for index, output in self.found.flow.outputs():
            self.found.choices[index].take(output)
            scored = output.prompt_logprobs or scored
        answers = [self._answer(choice) for choice in self.found.choices]
        answer = self._object("chat.completion", answers, self.found.flow.totals.usage()) | self._prompt_ids()
        if self.body.prompt_logprobs is None:
            return answer
        return answer | {"prompt_logprobs": prompt_logprobs_as_json(scored, self.body.prompt_logprobs, self.pieces)}

    def _prompt_ids(self) -> dict[str, list[int]]:
        return {"prompt_token_ids": list(self.found.prompt_ids)} if self.body.return_token_ids else {}

    def _ids(self, token_ids: Sequence[int]) -> dict[str, list[int]]:
        return {"token_ids": list(token_ids)} if self.body.return_token_ids else {}

    def _answer(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": choice.message,
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish,
            **self._ids(choice.token_ids),
        }

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        is_first = True
        async for index, output in self.found.flow.outputs():
            choice = self.found.choices[index]
            if not choice.has_started:
                choice.has_started = True
                opening = self._chunk(choice, {"role": "assistant", "content": ""}, Output(output.request_id))
                yield opening | (self._prompt_ids() if is_first else {})
                is_first = False
            for chunk in self._chunks(choice, output):
                yield chunk
        if self.body.wants_usage:
            yield self._object("chat.completion.chunk", [], self.found.flow.totals.usage())

    def _chunks(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        """What one output gives: its tokens are with the first of its chunks, and why it ended with the last."""
        deltas = choice.take(output)
        is_told = bool(
            output.logprobs or choice.finish is not None or (self.body.return_token_ids and output.token_ids)
        )
        deltas = deltas or ([{}] if is_told else [])
        bare = Output(output.request_id)
        return [
            self._chunk(
                choice, delta, output if place == 0 else bare, choice.finish if place == len(deltas) - 1 else None
            )
            for place, delta in enumerate(deltas)
        ]

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], output: Output, finish: str | None = None
    ) -> dict[str, Any]:
        head = {"index": choice.index, "delta": delta, "logprobs": self._logprobs(choice, output.logprobs)}
        ids = self._ids(output.token_ids)
        so_far = self.found.flow.totals.usage() if self.body.wants_usage_so_far else None
        return self._object("chat.completion.chunk", [{**head, "finish_reason": finish, **ids}], so_far)

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": [_as_json(entry, self.pieces) for entry in logprobs]} if choice.has_logprobs else None


def _as_json(entry: TokenLogprob, pieces: Pieces) -> dict[str, Any]:
    top = [_token(token_id, logprob, pieces) for token_id, logprob in alternatives(entry)] if entry.top else []
    return {**_token(entry.token_id, entry.logprob, pieces), "top_logprobs": top}


def _token(token_id: int, logprob: float, pieces: Pieces) -> dict[str, Any]:
    return {"token": pieces.text_of(token_id), "logprob": logprob, "bytes": list(pieces.bytes_of(token_id))}
