"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.engine import Output
from roadie.serving.http.answers import Completion, Error
from roadie.serving.http.bodies import CompletionBody
from roadie.serving.http.failures import ApiError
from roadie.serving.http.flow import Flow
from roadie.serving.http.pieces import Offsets, Pieces
from roadie.serving.http.prompts import Prompts
from roadie.serving.http.reply import StreamReply, WholeReply
from roadie.serving.http.scores import echoed_as_json, logprobs_as_json, prompt_logprobs_as_json
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
    num_choices, max_tokens = body.n or 1, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    service.check_choices(len(texts) * num_choices)
    special = body.add_special_tokens is not False
    prompts = [await service.prompts.encode(text, special=special) for text in texts]
    for prompt in prompts:
        service.check_length(len(prompt), max_tokens)
    constraint = await service.prepare(body.constraint())
    rules = [body.sampling(max_tokens, body.logprobs, choice) for choice in range(num_choices)]
    flow = service.flow(call, prompts, rules, whole=not body.stream, scoring=body.scoring, constraint=constraint)
    choices = [
        _choice(index, body, prompts[index // num_choices], texts[index // num_choices], service.prompts)
        for index in range(len(texts) * num_choices)
    ]
    writer = _Writer(call, flow, choices)
    if body.stream:
        return StreamReply(flow, writer.events(body), service.settings.request_timeout_s)
    return WholeReply(flow, writer.whole(), service.settings.request_timeout_s)


@router.post("/v1/embeddings", status_code=400, response_model=Error, tags=["generation"], summary="Refused")
async def embed() -> Response:
    """There are none: models here generate text."""
    raise ApiError(400, "this server has no embeddings; its models generate text", "unsupported_endpoint")


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


def _choice(
    index: int, body: CompletionBody, prompt_ids: tuple[int, ...], prompt: str | list[int], prompts: Prompts
) -> _Choice:
    echoed = _echoed(body, prompt, prompts)
    skipped = () if body.skip_special_tokens is False else prompts.pieces.special
    offsets = None if body.logprobs is None else Offsets(prompts.pieces, len(echoed), skipped=skipped)
    return _Choice(index, body, prompt_ids, echoed, offsets, prompts.pieces)


@dataclass
class _Choice:
    """One continuation as it grows. echoed: what stands before it; offsets: None where no logprobs are wanted."""

    index: int
    body: CompletionBody
    prompt_ids: tuple[int, ...]
    echoed: str
    offsets: Offsets | None
    pieces: Pieces
    text: str = ""
    has_started: bool = False
    finish: str | None = None
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    prompt_logprobs: list[Any] | None = None
    token_ids: list[int] = field(default_factory=list)

    def take(self, output: Output) -> tuple[str, dict[str, list[Any]] | None]:
        """What is new: text, and logprobs where they are wanted."""
        is_first, self.has_started = not self.has_started, True
        self.finish = None if output.finish is None else output.finish.value
        if is_first and self.body.prompt_logprobs is not None:
            self.prompt_logprobs = prompt_logprobs_as_json(
                output.prompt_logprobs, self.body.prompt_logprobs, self.pieces
            )
        new = self.echoed + output.text if is_first else output.text
        return new, self._logprobs(output, is_first)

    def _logprobs(self, output: Output, is_first: bool) -> dict[str, list[Any]] | None:
        if self.offsets is None or self.body.logprobs is None:
            return None
        new = logprobs_as_json(output.logprobs, self.offsets, self.pieces)
        if not (is_first and self.body.echo):
            return new
        prompt = echoed_as_json(self.echoed, self.prompt_ids, output.prompt_logprobs, self.body.logprobs, self.pieces)
        return {name: prompt[name] + values for name, values in new.items()}

    def keep(self, output: Output) -> None:
        """For an answer that is not streamed."""
        text, logprobs = self.take(output)
        self.text += text
        self.token_ids += output.token_ids
        for name, values in (logprobs or {}).items():
            self.logprobs.setdefault(name, []).extend(values)

    def whole(self) -> dict[str, Any]:
        """All of it."""
        scored = {} if self.prompt_logprobs is None else {"prompt_logprobs": self.prompt_logprobs}
        ids = self.ids(self.token_ids, with_prompt=True)
        return self.as_json(self.text, None if self.offsets is None else self.logprobs) | scored | ids

    def as_json(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}

    def ids(self, token_ids: Sequence[int], *, with_prompt: bool) -> dict[str, list[int]]:
        """Tokens, where they are wanted."""
        if not self.body.return_token_ids:
            return {}
        return {"token_ids": list(token_ids)} | ({"prompt_token_ids": list(self.prompt_ids)} if with_prompt else {})


@dataclass(frozen=True)
class _Writer:
    call: Call
    flow: Flow
    choices: list[_Choice]

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        head = {"id": self.call.id, "object": "text_completion", "created": self.call.created, "model": self.call.model}
        return {**head, "choices": choices, "usage": usage}

    async def whole(self) -> dict[str, Any]:
        async for index, output in self.flow.outputs():
            self.choices[index].keep(output)
        return self._object([choice.whole() for choice in self.choices], self.flow.totals.usage())

    async def events(self, body: CompletionBody) -> AsyncIterator[dict[str, Any]]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            is_first = not choice.has_started
            text, logprobs = choice.take(output)
            ids = choice.ids(output.token_ids, with_prompt=is_first)
            if text or output.logprobs or choice.finish is not None or ids.get("token_ids"):
                so_far = self.flow.totals.usage() if body.wants_usage_so_far else None
                yield self._object([choice.as_json(text, logprobs) | ids], so_far)
        if body.wants_usage:
            yield self._object([], self.flow.totals.usage())
