"""Continuing prompts, each in an adapter of its own, in one batch.

Prompts are padded on the left; row i of the batch uses ``prompts[i].adapter``, by the `adapter_names` of the tuner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roadie.errors import ConfigError, RoutingError
from roadie.training.adapters import NamedAdapter, load_adapted
from roadie.training.encoding import rendered, tokens_of, unended
from roadie.training.models import ModelSource, best_device
from roadie.training.prompts import BASE, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from roadie.tuner import PeftModel


@dataclass(frozen=True)
class Decoding:
    """How to continue; raises `ConfigError` where a value is not valid.

    temperature: 0 takes the likeliest token, otherwise tokens are drawn with `seed`, from the likeliest ones that make
    up the share `top_p`; beams: width of the beam search, 1 for none; max_new_tokens: at most.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"got {name}={getattr(self, name)}; wanted at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"got temperature={self.temperature}; wanted 0 (no sampling) or more, such as 0.8")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"got top_p={self.top_p}; wanted a share above 0 and at most 1")


def continue_prompts(
    prompts: Sequence[Prompt],
    adapters: Sequence[str | NamedAdapter] = (),
    *,
    model: str | ModelSource | None = None,
    decoding: Decoding | None = None,
    chat: bool = False,
) -> list[str]:
    """Load a model with `adapters` onto the accelerator of this machine and `generate`; raises as those do."""
    adapted = load_adapted(adapters, model)
    return generate(adapted.model.to(best_device()), adapted.tokenizer, prompts, decoding, chat=chat)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    *,
    chat: bool = False,
) -> list[str]:
    """The continuation of each prompt (without the prompt and without special tokens), all in one batch.

    chat: put each prompt through the tokenizer's chat template, as a message of the user.
    Raises `RoutingError` for an adapter the model has not, `ConfigError` for an empty prompt or a missing template. The
    random state of torch is as before afterwards.
    """
    if not prompts:
        return []
    routing = _routing(model, prompts)
    rows = [_tokens(tokenizer, prompt.text, chat=chat) for prompt in prompts]
    output = continued(model, tokenizer, rows, decoding or Decoding(), **routing)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output]


def continued(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    decoding: Decoding,
    **more: Any,
) -> Tensor:
    """The tokens ``[B, T]`` that go on from B rows of tokens; more: further arguments of transformers' generate.

    The random state of torch is as before afterwards.
    """
    pad = _pad_token(tokenizer)
    input_ids, attention_mask = (part.to(model.device) for part in _padded_left(rows, pad))
    devices = [model.device] if model.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"), torch.no_grad():
        torch.manual_seed(decoding.seed)
        output: Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pad_token_id=pad,
            **_arguments(decoding),
            **more,
        )
    return output[:, input_ids.shape[1] :]


def _routing(model: PreTrainedModel | PeftModel, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    known = list(getattr(model, "peft_config", {}))
    names = [BASE if prompt.adapter is None else prompt.adapter for prompt in prompts]
    unknown = sorted({name for name in names if name != BASE and name not in known})
    if unknown:
        raise RoutingError(f"got adapter {unknown[0]!r}; wanted one of {', '.join([*known, BASE])}; load it first")
    return {"adapter_names": names} if known else {}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    if chat and not tokenizer.chat_template:
        raise ConfigError("got chat for a tokenizer without a chat template; wanted one; leave chat out")
    if chat:
        text = rendered(tokenizer, f"prompt {text!r}", (("user", text),), opening=True)
    return text_tokens(tokenizer, text, is_whole=chat)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, is_whole: bool) -> list[int]:
    """The tokens of a text to go on with; is_whole: it has all special tokens, as a chat template writes them.

    Raises `ConfigError` where there is none.
    """
    tokens = tokens_of(tokenizer, text, special=not is_whole)
    tokens = tokens if is_whole else unended(tokens, tokenizer)
    if not tokens:
        raise ConfigError("got an empty prompt, and the tokenizer has no token to begin with; wanted some text")
    return tokens


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in tokens if token is not None)


def _padded_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, ``[B, T]`` each."""
    width = max(len(row) for row in rows)
    fill = [width - len(row) for row in rows]
    input_ids = torch.tensor([[*[pad] * n, *row] for row, n in zip(rows, fill, strict=True)])
    attention_mask = torch.tensor([[0] * n + [1] * len(row) for row, n in zip(rows, fill, strict=True)])
    return input_ids, attention_mask


def _arguments(decoding: Decoding) -> dict[str, Any]:
    """Arguments of transformers' generate; every one that the model's own generation config might set is set here."""
    sampling = decoding.temperature > 0
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.beams,
        "do_sample": sampling,
        "temperature": decoding.temperature if sampling else None,
        "top_p": decoding.top_p if sampling else None,
        "top_k": 0 if sampling else None,
    }
