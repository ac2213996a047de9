"""Prompts to tokens, and tokens to what is shown of them: a tokenizer of the server's own, in a thread of its own.

A conversation goes through the tokenizer's chat template. A tokenizer without one gets plain text:

    You are terse.            the system's words, if any

    User: What is a turtle?
    Assistant: A robot.
    User: And on land?
    Assistant:                and the model goes on; "\\nUser:" ends its answer
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from roadie.errors import PromptTooLong
from roadie.serving.http.bodies import Message
from roadie.serving.http.failures import ApiError

PLAIN_STOP = ("\nUser:",)
_SPEAKERS = {"user": "User", "assistant": "Assistant"}
_SHORT_CHARS = 2000
"""Texts up to here take less than a millisecond, and are not worth a thread."""
_HALF = "\ufffd"


class Prompts:
    """See the module. tokenizer: transformers' own kind; a copy is made, since the engine uses it at the same time."""

    def __init__(self, tokenizer: Any, max_prompt_chars: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._max_chars = max_prompt_chars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="roadie-prompts")
        self.has_template = getattr(tokenizer, "chat_template", None) is not None

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
            raise PromptTooLong(f"got a prompt of {num_chars} characters; wanted at most {self._max_chars}; shorten it")

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        ids = tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if not ids:
            raise ApiError(400, "got a prompt without tokens; wanted some text", "invalid_value", param="prompt")
        return ids

    async def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens of a conversation, up to where the model goes on."""
        self._check_length(sum(len(message.text) for message in messages))
        if self.has_template:
            return await self.encode(self._templated(messages), special=False)
        return await self.encode(plain_chat(messages))

    def _templated(self, messages: Sequence[Message]) -> str:
        turns = [
            {"role": message.role, "content": message.text} | ({"name": message.name} if message.name else {})
            for message in messages
        ]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template may raise what it likes, about roles in a wrong order for instance
            message = f"the model's chat template takes no such conversation ({type(error).__name__}); check the roles"
            raise ApiError(400, message, "invalid_value", param="messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """One token as text; half a character is shown as U+FFFD."""
        text = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        starts_a_word = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if starts_a_word else text

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def token_bytes(text: str) -> list[int] | None:
    """The UTF-8 of a token's text; None where it is a part of a character."""
    return None if _HALF in text else list(text.encode())


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation as plain text, for tokenizers without a chat template."""
    system = [message.text for message in messages if message.role not in _SPEAKERS]
    turns = [f"{_SPEAKERS[message.role]}: {message.text}" for message in messages if message.role in _SPEAKERS]
    head = "\n\n".join(system) + "\n\n" if system else ""
    return head + "\n".join([*turns, "Assistant:"])
