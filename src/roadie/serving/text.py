"""Tokens to text, as they come: no half characters, and nothing of a stop string before it is sure that it is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT_TOKENS = 6  # of the prompt: some tokenizers drop the space before the first token of a text
_LONGEST_CHARACTER_TOKENS = 8  # a character takes at most 4 bytes; whoever sends more has no character in mind
_HALF = "\ufffd"


class TextStream:
    """The text of one request. tokenizer: anything with ``decode(ids, skip_special_tokens=...)``.

    min_tokens: what these say is given as it is: stop strings are looked for after them.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer, self._stop, self._include_stop = tokenizer, tuple(stop), include_stop
        self._skip_special, self._num_free = skip_special, min_tokens
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._num_known = len(self._window)  # tokens of the window whose text was given already
        self._known = self._decode(self._window).rstrip(_HALF)
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """What can be shown now that a token came, and whether a stop string ended the text."""
        self._window.append(token_id)
        self._held += self._new_text(is_last=False)
        if self._num_free > 0:
            self._num_free -= 1
            shown, self._held = self._held, ""
            return shown, False
        return self._show()

    def end(self) -> str:
        """What was held back and is no stop string after all."""
        text, is_stopped = self._held + self._new_text(is_last=True), False
        self._held = text
        text, is_stopped = self._show()
        if not is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _new_text(self, *, is_last: bool) -> str:
        text = self._decode(self._window)
        is_half = text.endswith(_HALF) and len(self._window) - self._num_known < _LONGEST_CHARACTER_TOKENS
        if (is_half and not is_last) or len(text) < len(self._known):
            return ""
        new = text[len(self._known) :]
        self._window = self._window[self._num_known :] if self._num_known < len(self._window) else self._window
        self._num_known = len(self._window)
        self._known = self._decode(self._window)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)) if ids else ""

    def _show(self) -> tuple[str, bool]:
        found = [(self._held.find(stop), len(stop)) for stop in self._stop if stop in self._held]
        if found:
            begin, length = min(found)
            shown, self._held = self._held[: begin + length if self._include_stop else begin], ""
            return shown, True
        keep = self._num_uncertain()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def _num_uncertain(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
