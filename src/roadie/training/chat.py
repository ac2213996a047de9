"""A conversation with a base model and its adapters: what was said, which adapter answers, and answers as they are written.

    chat = Chat.open(["french"], decoding=Decoding(temperature=0.7))
    chat.take("Hello", show)            the answer goes to `show` piece by piece
    chat.take("/strength 0.5", show)    lines that begin with "/" are commands, see `HELP`

With a chat template the turns go through it; without one the model goes on with the text so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from roadie.errors import ConfigError, RoadieError
from roadie.training.adapters import NamedAdapter, load_adapted
from roadie.training.encoding import rendered
from roadie.training.generation import Decoding, continued, text_tokens
from roadie.training.models import ModelSource, best_device
from roadie.training.prompts import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from roadie.tuner import PeftModel

Show = Callable[[str], None]

HELP = f"""/adapter NAME    answer with this adapter ({BASE}: with the base model); without a name: which there are
/strength X      with so much of it: 1 is as it was trained, 0.5 half of it, -1 its inverse
/reset           forget what was said
/quit            end; Ctrl-D does too. Ctrl-C stops an answer
//...            a text that begins with a slash
"""


class UnknownCommand(RoadieError, ValueError):
    """A line that begins with a slash is no command, or lacks what the command needs."""


@dataclass
class Chat:
    """A conversation. adapter: that which answers, None for the base model; strength: how much of it.

    turns: (role, text), in order; system: what a chat template is told first.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    names: tuple[str, ...] = ()
    decoding: Decoding = field(default_factory=Decoding)
    system: str | None = None
    adapter: str | None = None
    strength: float = 1.0
    turns: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        adapters: Sequence[str | NamedAdapter] = (),
        *,
        model: str | ModelSource | None = None,
        decoding: Decoding | None = None,
        system: str | None = None,
    ) -> Chat:
        """Load a model with `adapters`, the first of which answers; raises as `roadie.training.load_adapted` does."""
        adapted = load_adapted(adapters, model)
        if system is not None and not adapted.tokenizer.chat_template:
            raise ConfigError("got system for a tokenizer without a chat template; wanted one; leave system out")
        on_device = adapted.model.to(best_device())
        first = adapted.names[0] if adapted.names else None
        return cls(on_device, adapted.tokenizer, adapted.names, decoding or Decoding(), system, first)

    @property
    def has_template(self) -> bool:
        """Whether turns go through a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def speaker(self) -> str:
        """Who answers: the name of an adapter, with its strength unless that is 1, or of the base model."""
        if self.adapter is None:
            return BASE
        return self.adapter if self.strength == 1 else f"{self.adapter}={self.strength:g}"

    def take(self, line: str, show: Show) -> bool:
        """Answer a line, or do what it commands; whether the conversation goes on.

        Raises `UnknownCommand`, and `ConfigError` for a text that is too long; the conversation is as before then.
        """
        if line.startswith("/") and not line.startswith("//"):
            return self._command(line, show)
        if line.strip():
            self.answer(line.removeprefix("/") if line.startswith("//") else line, show)
        return True

    def _command(self, line: str, show: Show) -> bool:
        name, _, value = line.strip().partition(" ")
        if name == "/adapter":
            self._choose(value.strip(), show)
        elif name == "/strength":
            self._strengthen(value)
        elif name == "/reset":
            self.turns.clear()
        elif name == "/help":
            show(HELP)
        elif name != "/quit":
            raise UnknownCommand(f"got {name!r}; wanted /adapter, /strength, /reset, /help or /quit")
        return name != "/quit"

    def _choose(self, name: str, show: Show) -> None:
        known = (*self.names, BASE)
        if not name:
            show("".join(f"{'*' if one == (self.adapter or BASE) else ' '} {one}\n" for one in known))
        elif name in known:
            self.adapter = None if name == BASE else name
        else:
            raise UnknownCommand(f"got adapter {name!r}; wanted one of {', '.join(known)}")

    def _strengthen(self, text: str) -> None:
        try:
            strength = float(text)
        except ValueError:
            strength = float("nan")
        if not abs(strength) < float("inf"):
            raise UnknownCommand(f"got strength {text!r}; wanted a number, such as 0.5")
        self.strength = strength

    def answer(self, text: str, show: Show) -> str:
        """What the model answers to a text, shown as it is written; an answer that Ctrl-C stops is kept as far as it came."""
        turns = [*self.turns, ("user", text)]
        turns, tokens = self._that_fit(turns)
        streamer = _Shown(self.tokenizer, show)
        decoding = replace(self.decoding, seed=self.decoding.seed + len(self.turns))
        try:
            continued(self.model, self.tokenizer, [tokens], decoding, streamer=streamer, **self._routing())
        except KeyboardInterrupt:
            streamer.end()
            show(" [stopped]")
        self.turns = [*turns, ("assistant", streamer.text)]
        return streamer.text

    def _that_fit(self, turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[int]]:
        """The turns without the oldest ones that the context has no room for, and their tokens."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            tokens = text_tokens(self.tokenizer, self._text(turns), is_whole=self.has_template)
            if room is None or len(tokens) + self.decoding.max_new_tokens <= room:
                return turns, tokens
            if len(turns) <= 2:
                raise ConfigError(
                    f"got {len(tokens)} tokens, and up to {self.decoding.max_new_tokens} of the answer; wanted {room} at most; "
                    "say it in fewer words, or take fewer of the answer (max_new_tokens=16)"
                )
            turns = turns[2:]

    def _text(self, turns: Sequence[tuple[str, str]]) -> str:
        """What the model reads: the turns in its template, or one after the other, each text of the user in a new line."""
        if self.has_template:
            first = [("system", self.system)] if self.system is not None else []
            return rendered(self.tokenizer, "this conversation", (*first, *turns), opening=True)
        return "".join(f"\n{text}" if role == "user" else text for role, text in turns).removeprefix("\n")

    def _routing(self) -> dict[str, Any]:
        if not self.names:
            return {}
        if self.adapter is None:
            return {"adapter_names": [BASE]}
        return {"adapter_names": [self.adapter if self.strength == 1 else {self.adapter: self.strength}]}


class _Shown(TextStreamer):
    """transformers' streamer, which shows whole words as they are done; text: all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece."""
        self.text += text
        self._show(text)
