"""A conversation on its way through the engine: its prompt, how it is answered, and the answers as they grow."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from roadie.serving.belongings import OwnChat
from roadie.serving.engine import Output, Sampling, TokenLogprob
from roadie.serving.http.bodies import ChatBody
from roadie.serving.http.flow import Flow
from roadie.serving.http.offers import asked_of, offer_of
from roadie.serving.http.prompts import PLAIN_STOP, ChatForm
from roadie.serving.http.service import Call, Service
from roadie.serving.http.tools import CallReader, Offer, Said, specials


@dataclass(frozen=True)
class Conversation:
    """What was asked for, and what comes of it."""

    call: Call
    prompt_ids: tuple[int, ...]
    flow: Flow
    choices: list[Choice]


async def begin(body: ChatBody, call: Call, service: Service) -> Conversation:
    """Submit a conversation, n times, by the model's chat template, or as plain text where it has none."""
    num_choices = body.n or 1
    service.check_choices(num_choices)
    own = own_chat_of(call, service)
    offer = offer_of(body, None if own is None else own.template, service)
    form = form_of(body, own)
    prompt = await service.prompts.encode_chat(body.messages, form)
    max_tokens = _max_tokens(body, len(prompt), service)
    service.check_length(len(prompt), max_tokens)
    has_template = own is not None or service.prompts.has_template
    constraint = await service.prepare(asked_of(body, offer, service))
    stop = () if has_template else PLAIN_STOP
    rules = [body.sampling(max_tokens, body.num_logprobs, choice, stop) for choice in range(num_choices)]
    rules = [_fitting(rule, body, own, offer, service) for rule in rules]
    flow = service.flow(call, [prompt], rules, whole=not body.stream, scoring=body.scoring, constraint=constraint)
    is_plain = form.opens_answer and not has_template
    choices = [Choice(index, body.logprobs is True, is_plain, offer) for index in range(num_choices)]
    return Conversation(call, prompt, flow, choices)


def _fitting(rules: Sampling, body: ChatBody, own: OwnChat | None, offer: Offer | None, service: Service) -> Sampling:
    """Rules that let the answer end as the adapter's do, and let its calls be told from text."""
    if offer is not None and body.skip_special_tokens is None and specials(offer.style, service.prompts.special_ids):
        rules = replace(rules, skip_special_tokens=False)
    if own is not None and own.end_token and not body.ignore_eos:
        rules = _ending_with(service.prompts.id_of(own.end_token), rules)
    return rules


def own_chat_of(call: Call, service: Service) -> OwnChat | None:
    """What the one adapter that is asked for brings; a blend of several has none of its own."""
    wish = call.wish
    names = [wish] if isinstance(wish, str) else [name for name, weight in (wish or {}).items() if weight]
    return service.engine.own_chat(names[0]) if len(names) == 1 and service.settings.use_adapter_templates else None


def _ending_with(token_id: int | None, rules: Sampling) -> Sampling:
    return rules if token_id is None else replace(rules, stop_token_ids=(*rules.stop_token_ids, token_id))


def form_of(body: ChatBody, own: OwnChat | None) -> ChatForm:
    """How the conversation becomes a prompt."""
    continues = bool(body.continue_final_message)
    opens = body.add_generation_prompt is not False and not continues
    template = None if own is None else own.template
    tools = [tool.shown for tool in body.offered]
    return ChatForm(body.chat_template_kwargs or {}, opens, continues, body.add_special_tokens, template, tools)


def _max_tokens(body: ChatBody, num_prompt_tokens: int, service: Service) -> int:
    if body.most_tokens is not None:
        return body.most_tokens
    left = max(1, service.engine.limits.max_context_tokens - num_prompt_tokens)
    return left if service.settings.max_tokens is None else min(left, service.settings.max_tokens)


@dataclass
class Choice:
    """One answer as it grows. is_plain: after "Assistant:" comes a space, which is no part of the answer."""

    index: int
    has_logprobs: bool
    is_plain: bool
    offer: Offer | None
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    has_started: bool = False

    def __post_init__(self) -> None:
        self._reader = None if self.offer is None else CallReader(self.offer)

    def take(self, output: Output) -> list[dict[str, Any]]:
        """An output came; what is new, as a stream has it."""
        self.finish = None if output.finish is None else output.finish.value
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        new = output.text.lstrip(" ") if self.is_plain and not self.text else output.text
        if self._reader is None:
            found = [Said(new)] if new else []
        else:
            found = self._reader.push(new) + (self._reader.end() if self.finish is not None else [])
        deltas = [self._keep(said) for said in found]
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"
        return deltas

    def _keep(self, said: Said) -> dict[str, Any]:
        if said.call is None:
            self.text += said.text
            return {"content": said.text}
        part: dict[str, Any] = {"function": {"arguments": said.text}}
        if said.name is not None:
            assert self.offer is not None
            part = {
                "id": self.offer.style.new_id(),
                "type": "function",
                "function": {"name": said.name, "arguments": said.text},
            }
            self.calls.append(copy.deepcopy(part))
        else:
            self.calls[said.call]["function"]["arguments"] += said.text
        return {"tool_calls": [{"index": said.call, **part}]}

    @property
    def message(self) -> dict[str, Any]:
        """All that was said."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant", "content": self.text or None if self.calls else self.text, **calls}
