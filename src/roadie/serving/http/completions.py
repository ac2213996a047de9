"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.engine import Output, TokenLogprob
from roadie.serving.http.answers import Completion
from roadie.serving.http.bodies import CompletionBody
from roadie.serving.http.flow import Flow
from roadie.serving.http.pieces import Offsets, Pieces
from roadie.serving.http.prompts import Prompts
from roadie.serving.http.reply import StreamReply, WholeReply
from roadie.serving.http.service import Call, service_of

DEFAULT_MAX_TOKENS = 16
router = APIRouter()


@router.post("/v1/completions", response_model=Completion, tags=["generation"], summary="Continue text")
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continue one prompt or several, each n times, with the adapter, or blend, that is asked for."""
    service = service_of(request)
    body.check()
    call = service.begin("cmpl", body.model, body.adapters, request)
    texts = _prompts(body)
    num_choices, max_tokens = body.n or 1, body.max_tokens or DEFAULT_MAX_TOKENS
    service.check_choices(len(texts) * num_choices)
    special = body.add_special_tokens is not False
    prompts = [await service.prompts.encode(text, special=special) for text in texts]
    for prompt in prompts:
        service.check_length(len(prompt), max_tokens)
    rules = [body.sampling(max_tokens, body.logprobs, choice) for choice in range(num_choices)]
    flow = service.flow(call, prompts, rules, whole=not body.stream)
    choices = [
        _Choice(index, *_start(body, texts[index // num_choices], service.prompts))
        for index in range(len(texts) * num_choices)
    ]
    writer = _Writer(call, flow, choices, service.prompts.pieces)
    if body.stream:
        return StreamReply(flow, writer.events(body.wants_usage), service.settings.request_timeout_s)
    return WholeReply(flow, writer.whole(), service.settings.request_timeout_s)


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, each text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _echoed(body: CompletionBody, prompt: str | list[int], prompts: Prompts) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else prompts.decode(prompt)


def _start(body: CompletionBody, prompt: str | list[int], prompts: Prompts) -> tuple[str, Offsets | None]:
    """What stands before a completion, and where its tokens begin, if anybody wants to know."""
    echoed = _echoed(body, prompt, prompts)
    if body.logprobs is None:
        return echoed, None
    return echoed, Offsets(prompts.pieces, len(echoed), skip_special=body.skip_special_tokens is not False)


@dataclass
class _Choice:
    """One continuation as it grows. echoed: what stands before it; offsets: None where no logprobs are wanted."""

    index: int
    echoed: str
    offsets: Offsets | None
    text: str = ""
    has_started: bool = False
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: Output) -> str:
        """What is new."""
        new = output.text if self.has_started else self.echoed + output.text
        self.has_started = True
        self.finish = None if output.finish is None else output.finish.value
        return new

    def as_json(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}


@dataclass(frozen=True)
class _Writer:
    call: Call
    flow: Flow
    choices: list[_Choice]
    pieces: Pieces

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        head = {"id": self.call.id, "object": "text_completion", "created": self.call.created, "model": self.call.model}
        return {**head, "choices": choices, "usage": usage}

    async def whole(self) -> dict[str, Any]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            choice.text += choice.take(output)
            choice.logprobs.extend(output.logprobs)
        done = [choice.as_json(choice.text, self._logprobs(choice, choice.logprobs)) for choice in self.choices]
        return self._object(done, self.flow.totals.usage())

    async def events(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            text = choice.take(output)
            if text or output.logprobs or choice.finish is not None:
                yield self._object([choice.as_json(text, self._logprobs(choice, output.logprobs))], None)
        if with_usage:
            yield self._object([], self.flow.totals.usage())

    def _logprobs(self, choice: _Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return None if choice.offsets is None else logprobs_as_json(logprobs, choice.offsets, self.pieces)


def logprobs_as_json(logprobs: Sequence[TokenLogprob], offsets: Offsets, pieces: Pieces) -> dict[str, Any]:
    """Tokens, their logprobs, the most likely ones, and where each begins."""
    return {
        "tokens": [pieces.key_of(entry.token_id) for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [pieces.keyed(entry) for entry in logprobs],
        "text_offset": [offsets.next(entry.token_id) for entry in logprobs],
    }
