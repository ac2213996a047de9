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
    prompts = [await service.prompts.encode(text) for text in texts]
    for prompt in prompts:
        service.check_length(len(prompt), max_tokens)
    rules = [body.sampling(max_tokens, body.logprobs, choice) for choice in range(num_choices)]
    flow = service.flow(call, prompts, rules, whole=not body.stream)
    choices = [
        _Choice(index, _echoed(body, texts[index // num_choices], service.prompts), body.logprobs is not None)
        for index in range(len(texts) * num_choices)
    ]
    writer = _Writer(call, flow, choices, service.prompts)
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


@dataclass
class _Choice:
    """One continuation as it grows. echoed: what stands before it."""

    index: int
    echoed: str
    has_logprobs: bool
    text: str = ""
    num_chars: int = 0
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: Output) -> tuple[str, int]:
        """What is new, and at which character of the whole text it begins."""
        new = self.echoed + output.text if self.num_chars == 0 else output.text
        start, self.num_chars = self.num_chars, self.num_chars + len(new)
        self.finish = None if output.finish is None else output.finish.value
        return new, start

    def as_json(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}


@dataclass(frozen=True)
class _Writer:
    call: Call
    flow: Flow
    choices: list[_Choice]
    prompts: Prompts

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        head = {"id": self.call.id, "object": "text_completion", "created": self.call.created, "model": self.call.model}
        return {**head, "choices": choices, "usage": usage}

    async def whole(self) -> dict[str, Any]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            choice.text += choice.take(output)[0]
            choice.logprobs.extend(output.logprobs)
        done = [
            choice.as_json(choice.text, self._logprobs(choice, choice.logprobs, len(choice.echoed)))
            for choice in self.choices
        ]
        return self._object(done, self.flow.totals.usage())

    async def events(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            text, start = choice.take(output)
            if text or output.logprobs or choice.finish is not None:
                yield self._object([choice.as_json(text, self._logprobs(choice, output.logprobs, start))], None)
        if with_usage:
            yield self._object([], self.flow.totals.usage())

    def _logprobs(self, choice: _Choice, logprobs: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        return logprobs_as_json(logprobs, start, self.prompts) if choice.has_logprobs else None


def logprobs_as_json(logprobs: Sequence[TokenLogprob], start: int, prompts: Prompts) -> dict[str, Any]:
    """Tokens, their logprobs, the most likely ones, and where each begins, from the character `start` on."""
    tokens = [prompts.token_text(entry.token_id) for entry in logprobs]
    offsets = [start]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [_top(entry, prompts) for entry in logprobs],
        "text_offset": offsets[:-1],
    }


def _top(entry: TokenLogprob, prompts: Prompts) -> dict[str, float]:
    """By text; of two tokens with the same text the likelier."""
    top: dict[str, float] = {}
    for token_id, logprob in entry.top:
        top.setdefault(prompts.token_text(token_id), logprob)
    return top
