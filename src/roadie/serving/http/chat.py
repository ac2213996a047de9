"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from roadie.serving.belongings import OwnChat
from roadie.serving.engine import Output, Sampling, TokenLogprob
from roadie.serving.http.answers import Chat
from roadie.serving.http.bodies import ChatBody
from roadie.serving.http.flow import Flow
from roadie.serving.http.pieces import Pieces, alternatives
from roadie.serving.http.prompts import PLAIN_STOP, ChatForm
from roadie.serving.http.reply import StreamReply, WholeReply
from roadie.serving.http.scores import prompt_logprobs_as_json
from roadie.serving.http.service import Call, Service, service_of

router = APIRouter()


@router.post("/v1/chat/completions", response_model=Chat, tags=["generation"], summary="Answer a conversation")
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation, n times, by the model's chat template, or as plain text where it has none."""
    service = service_of(request)
    body.check()
    call = service.begin("chatcmpl", body.model, body.adapters, request)
    num_choices = body.n or 1
    service.check_choices(num_choices)
    own = _own_chat(call, service)
    form = _form(body, own)
    prompt = await service.prompts.encode_chat(body.messages, form)
    max_tokens = _max_tokens(body, len(prompt), service)
    service.check_length(len(prompt), max_tokens)
    has_template = own is not None or service.prompts.has_template
    stop = () if has_template else PLAIN_STOP
    is_plain = form.opens_answer and not has_template
    constraint = await service.prepare(body.constraint())
    rules = [body.sampling(max_tokens, body.num_logprobs, choice, stop) for choice in range(num_choices)]
    if own is not None and own.end_token and not body.ignore_eos:
        rules = [_ending_with(service.prompts.id_of(own.end_token), rule) for rule in rules]
    flow = service.flow(call, [prompt], rules, whole=not body.stream, scoring=body.scoring, constraint=constraint)
    writer = _Writer(
        call,
        flow,
        [_Choice(index, body.logprobs is True, is_plain) for index in range(num_choices)],
        service.prompts.pieces,
        body.prompt_logprobs,
    )
    if body.stream:
        return StreamReply(flow, writer.events(body.wants_usage), service.settings.request_timeout_s)
    return WholeReply(flow, writer.whole(), service.settings.request_timeout_s)


def _own_chat(call: Call, service: Service) -> OwnChat | None:
    """What the one adapter that is asked for brings; a blend of several has none of its own."""
    wish = call.wish
    names = [wish] if isinstance(wish, str) else [name for name, weight in (wish or {}).items() if weight]
    return service.engine.own_chat(names[0]) if len(names) == 1 and service.settings.use_adapter_templates else None


def _ending_with(token_id: int | None, rules: Sampling) -> Sampling:
    return rules if token_id is None else replace(rules, stop_token_ids=(*rules.stop_token_ids, token_id))


def _form(body: ChatBody, own: OwnChat | None) -> ChatForm:
    continues = bool(body.continue_final_message)
    opens = body.add_generation_prompt is not False and not continues
    template = None if own is None else own.template
    return ChatForm(body.chat_template_kwargs or {}, opens, continues, body.add_special_tokens, template)


def _max_tokens(body: ChatBody, num_prompt_tokens: int, service: Service) -> int:
    if body.most_tokens is not None:
        return body.most_tokens
    left = max(1, service.engine.limits.max_context_tokens - num_prompt_tokens)
    return left if service.settings.max_tokens is None else min(left, service.settings.max_tokens)


@dataclass
class _Choice:
    """One answer as it grows. is_plain: after "Assistant:" comes a space, which is no part of the answer."""

    index: int
    has_logprobs: bool
    is_plain: bool
    text: str = ""
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    has_started: bool = False

    def take(self, output: Output) -> str:
        """An output came; the text that is new."""
        self.finish = None if output.finish is None else output.finish.value
        new = output.text.lstrip(" ") if self.is_plain and not self.text else output.text
        self.text += new
        return new


@dataclass(frozen=True)
class _Writer:
    call: Call
    flow: Flow
    choices: list[_Choice]
    pieces: Pieces
    num_prompt_top: int | None

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        head = {"id": self.call.id, "object": kind, "created": self.call.created, "model": self.call.model}
        return {**head, "choices": choices, "usage": usage}

    async def whole(self) -> dict[str, Any]:
        scored: Sequence[TokenLogprob] = ()
        async for index, output in self.flow.outputs():
            self.choices[index].take(output)
            self.choices[index].logprobs.extend(output.logprobs)
            scored = output.prompt_logprobs or scored
        answer = self._object(
            "chat.completion", [self._answer(choice) for choice in self.choices], self.flow.totals.usage()
        )
        if self.num_prompt_top is None:
            return answer
        return answer | {"prompt_logprobs": prompt_logprobs_as_json(scored, self.num_prompt_top, self.pieces)}

    def _answer(self, choice: _Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish,
        }

    async def events(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        async for index, output in self.flow.outputs():
            choice = self.choices[index]
            if not choice.has_started:
                choice.has_started = True
                yield self._chunk(choice, {"role": "assistant", "content": ""}, ())
            text = choice.take(output)
            if text or output.logprobs or choice.finish is not None:
                yield self._chunk(choice, {"content": text} if text else {}, output.logprobs)
        if with_usage:
            yield self._object("chat.completion.chunk", [], self.flow.totals.usage())

    def _chunk(self, choice: _Choice, delta: dict[str, str], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        head = {"index": choice.index, "delta": delta, "logprobs": self._logprobs(choice, logprobs)}
        return self._object("chat.completion.chunk", [{**head, "finish_reason": choice.finish}], None)

    def _logprobs(self, choice: _Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": [_as_json(entry, self.pieces) for entry in logprobs]} if choice.has_logprobs else None


def _as_json(entry: TokenLogprob, pieces: Pieces) -> dict[str, Any]:
    top = [_token(token_id, logprob, pieces) for token_id, logprob in alternatives(entry)] if entry.top else []
    return {**_token(entry.token_id, entry.logprob, pieces), "top_logprobs": top}


def _token(token_id: int, logprob: float, pieces: Pieces) -> dict[str, Any]:
    return {"token": pieces.text_of(token_id), "logprob": logprob, "bytes": list(pieces.bytes_of(token_id))}
