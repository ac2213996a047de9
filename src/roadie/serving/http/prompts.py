"""Prompts to tokens: a tokenizer of the server's own, in a thread of its own.

A conversation goes through the tokenizer's chat template. A tokenizer without one gets plain text:

    You are terse.            the system's words, if any

    User: What is a turtle?
    Assistant: A robot.
    User: And on land?
    Assistant:                and the model goes on; "\\nUser:" ends its answer

`ChatForm` has what a request may want otherwise.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from roadie.errors import PromptTooLong
from roadie.serving.http.bodies import Message
from roadie.serving.http.failures import ApiError
from roadie.serving.http.pieces import Pieces
from roadie.serving.http.turns import turns_of

PLAIN_STOP = ("\nUser:",)
_SPEAKERS = {"user": "User", "assistant": "Assistant"}
_SHORT_CHARS = 2000
"""Texts up to here take less than a millisecond, and are not worth a thread."""


@dataclass(frozen=True)
class ChatForm:
    """How a conversation becomes a prompt.

    variables: of the chat template. opens_answer: the beginning of an answer follows the last message. continues_last: the
    prompt ends where the text of the last message does. special: whether the tokenizer puts its own tokens around it;
    None: around plain text alone, since a template has them. template: that of an adapter, instead of the model's. tools: as
    OpenAI's requests have them.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    opens_answer: bool = True
    continues_last: bool = False
    special: bool | None = None
    template: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()


class Prompts:
    """See the module. tokenizer: transformers' own kind; a copy is made, since the engine uses it at the same time."""

    def __init__(self, tokenizer: Any, max_prompt_chars: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._max_chars = max_prompt_chars
        self.pieces = Pieces(self._tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="roadie-prompts")
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self.special_ids = {
            token.content: token_id
            for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if token.special
        }
        self._no_variables = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}

    async def encode(self, prompt: str | Sequence[int], *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a prompt, with the tokenizer's own around it where `special`. Raises `PromptTooLong`, `ApiError`."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        self._check_length(len(prompt))
        if len(prompt) <= _SHORT_CHARS:
            return self._encode(prompt, special)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt, special)

    def _check_length(self, num_chars: int) -> None:
        if num_chars > self._max_chars:
            raise PromptTooLong(
                f"This model's maximum context length is exceeded: the prompt is too long, {num_chars} characters; wanted at "
                f"most {self._max_chars}; shorten it"
            )

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        ids = tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if not ids:
            raise ApiError(400, "got a prompt without tokens; wanted some text", "invalid_value", param="prompt")
        return ids

    async def encode_chat(self, messages: Sequence[Message], form: ChatForm) -> tuple[int, ...]:
        """The tokens of a conversation, up to where the model goes on."""
        self._check_length(sum(len(message.text) for message in messages))
        has_template = self.has_template or form.template is not None
        self._check_variables(form.variables, has_template)
        if form.template is not None:  # which nobody has tried: not in the thread of the server's loop
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(self._thread, self._templated, messages, form)
        else:
            text = self._templated(messages, form) if has_template else plain_chat(messages, form)
        return await self.encode(text, special=form.special is True if has_template else form.special is not False)

    def template_for_tools(self, own: str | None) -> str:
        """The chat template that a conversation with tools is rendered by; empty where there is none."""
        if own is None and not self.has_template:
            return ""
        return str(self._tokenizer.get_chat_template(own, tools=[{}]))

    def id_of(self, token: str) -> int | None:
        """The id of a token; None where the vocabulary has none of that name."""
        found = self._tokenizer.convert_tokens_to_ids(token)
        is_it = isinstance(found, int) and self._tokenizer.convert_ids_to_tokens(found) == token
        return found if is_it else None

    def _check_variables(self, variables: Mapping[str, Any], has_template: bool) -> None:
        """Those of a template, and nothing that would have another conversation or another template rendered."""
        wrong = [name for name in variables if name in self._no_variables or not has_template]
        if wrong:
            reason = (
                "is no variable of a chat template" if has_template else "is for a chat template; this model has none"
            )
            message = f"got {wrong[0][:40]!r} in chat_template_kwargs, which {reason}; leave it out"
            raise ApiError(400, message, "invalid_value", param="chat_template_kwargs")

    def _templated(self, messages: Sequence[Message], form: ChatForm) -> str:
        tools = list(form.tools) or None
        try:
            template = self._tokenizer.get_chat_template(form.template, tools=tools)
            return str(
                self._tokenizer.apply_chat_template(
                    turns_of(messages, template),
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=form.opens_answer,
                    continue_final_message=form.continues_last,
                    **form.variables,
                )
            )
        except Exception as error:  # a template may raise what it likes, about roles in a wrong order for instance
            said = f": {str(error)[:200]}" if type(error).__name__ == "TemplateError" else ""
            message = (
                f"the model's chat template takes no such conversation ({type(error).__name__}{said}); check the roles, "
                "arguments of calls, and chat_template_kwargs"
            )
            raise ApiError(400, message, "invalid_value", param="messages") from None

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of a prompt of token ids. special: with that of special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def plain_chat(messages: Sequence[Message], form: ChatForm) -> str:
    """A conversation as plain text, for tokenizers without a chat template. Raises `ApiError`."""
    if form.continues_last and messages[-1].role not in _SPEAKERS:
        message = f"got continue_final_message and a last message of role {messages[-1].role}; wanted one of user or assistant"
        raise ApiError(400, message, "invalid_value", param="messages")
    system = [message.text for message in messages if message.role not in _SPEAKERS]
    turns = [f"{_SPEAKERS[message.role]}: {message.text}" for message in messages if message.role in _SPEAKERS]
    head = "\n\n".join(system) + "\n\n" if system else ""
    return head + "\n".join([*turns, "Assistant:"] if form.opens_answer else turns)
