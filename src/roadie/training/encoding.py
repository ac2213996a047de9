"""Records to token examples: what the model reads, and on which tokens the loss is taken.

An `Example` is a pair of equally long tuples; a label of -100 takes no part in the loss (torch's convention). Packed
texts are joined with an end-of-text token between them and cut into blocks of ``max_length``; every other record is
one example and is cut where it is longer: a text at its end, a prompt at its beginning.
"""

from __future__ import annotations

import hashlib
import logging
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from roadie.errors import ConfigError
from roadie.training.rows import Chat, Completion, DataError, Instruction, Preference, Record, Text, Turns

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("roadie")

IGNORED = -100

Row = TypeVar("Row")


@dataclass(frozen=True)
class Example:
    """Token numbers and labels of one example; equal lengths, at least two tokens.

    starts: where each of several examples begins that lie in one row (`roadie.training.packing`); one begins at 0.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def positions(self) -> tuple[int, ...]:
        """The position of each token in its own example."""
        ends = (*self.starts[1:], len(self.input_ids))
        return tuple(place for start, end in zip(self.starts, ends, strict=True) for place in range(end - start))


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """The examples of `records`, each of 2 to `max_length` tokens; packed texts become full blocks, at the end.

    Raises `DataError` where nothing is left to learn from, or a chat meets a tokenizer without a chat template.
    """
    packed: list[int] = []
    examples: list[Example] = []
    cut = 0
    for record in records:
        if isinstance(record, Text) and record.packed:
            packed += ended(tokens_of(tokenizer, record.text), tokenizer)
            continue
        example, was_cut = one_example(record, tokenizer, max_length)
        examples.append(example)
        cut += was_cut
    examples += _blocks(packed, max_length)
    if not examples:
        raise DataError("got no example; wanted at least two tokens of text; check the data")
    if cut:
        logger.warning("cut %d of %d examples at %d tokens", cut, len(examples), max_length)
    return examples


def one_example(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Example, bool]:
    """The example of a record, and whether it was cut; raises as `encode` does."""
    pieces = _pieces(record, tokenizer)
    input_ids = [token for tokens, _ in pieces for token in tokens]
    labels = [token if learnt else IGNORED for tokens, learnt in pieces for token in tokens]
    if len(input_ids) < 2 or all(label == IGNORED for label in labels[1:]):
        raise DataError(f"{record.where}: got nothing to predict; wanted at least two tokens; lengthen or remove it")
    window = _window(labels, max_length)
    return Example(tuple(input_ids[window]), tuple(labels[window])), len(input_ids) > max_length


def _window(labels: Sequence[int], max_length: int) -> slice:
    """The part of an example that is kept: its beginning, moved right until half of it may be learnt from."""
    overlong = len(labels) - max_length
    if overlong <= 0:
        return slice(0, len(labels))
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    learnt = len(labels) - first
    start = max(0, min(overlong, first - max(max_length - learnt, max_length // 2)))
    return slice(start, start + max_length)


def _pieces(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    """Runs of tokens, each with whether it is learnt."""
    if isinstance(record, Preference):
        raise DataError(
            f"{record.where}: got a preference (chosen and rejected); wanted something to learn as it is; train with method "
            "dpo (--method dpo), or give other rows"
        )
    if isinstance(record, Instruction):
        return _pieces(record.as_chat if tokenizer.chat_template else record.as_completion, tokenizer)
    if isinstance(record, Text):
        return [(ended(tokens_of(tokenizer, record.text), tokenizer), True)]
    if isinstance(record, Completion):
        completion = ended(tokens_of(tokenizer, record.completion, special=False), tokenizer)
        return [(unended(tokens_of(tokenizer, record.prompt), tokenizer), False), (completion, True)]
    return [(tokens_of(tokenizer, text, special=False), learnt) for text, learnt in _chat_pieces(record, tokenizer)]


def _chat_pieces(record: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces: an assistant's turn, after the opening the template gives it, is learnt.

    A template that rewrites earlier turns (some drop former reasoning) is followed as it would be at inference: only
    those turns are learnt whose rendering is still a part of the whole.
    """
    render = partial(rendered, tokenizer, record.where)
    whole = render(record.turns)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for number, (role, _) in enumerate(record.turns):
        if role != "assistant" or number in record.left_out:
            continue
        opening, upto = render(record.turns[:number], opening=True), render(record.turns[: number + 1])
        if done <= len(opening) < len(upto) and whole.startswith(upto) and upto.startswith(opening):
            pieces += [(whole[done : len(opening)], False), (whole[len(opening) : len(upto)], True)]
            done = len(upto)
    if not pieces:
        raise DataError(
            f"{record.where}: the chat template gives no assistant turn that could be learnt; use prompt and completion"
        )
    return pieces


def rendered(tokenizer: PreTrainedTokenizerBase, where: str, turns: Turns, *, opening: bool = False) -> str:
    """The turns as the chat template writes them; opening: and the beginning of an assistant's turn after them.

    Raises `DataError`, naming `where`, for a tokenizer without a template, and for turns that the template refuses.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: got messages, but the tokenizer of this model has no chat template; "
            'use "prompt" and "completion", or a model that has one'
        )
    if not turns:
        return ""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
    except jinja2.TemplateError as error:
        raise DataError(
            f"{where}: got turns {', '.join(role for role, _ in turns)}; the chat template of this model takes others "
            f"({error}); change the roles, or leave it out"
        ) from None


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The tokens of a text, with those that the tokenizer puts around every text (special) or without."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With an end-of-text token, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def unended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the end-of-text token that some tokenizers add to everything, and that a prompt must not have."""
    end = tokenizer.eos_token_id
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == end else tokens


def _blocks(tokens: list[int], length: int) -> Iterator[Example]:
    """Full blocks and, where it can be learnt from, the rest."""
    for start in range(0, len(tokens), length):
        block = tuple(tokens[start : start + length])
        if len(block) >= 2:
            yield Example(block, block)


def split(examples: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Examples to train on and to evaluate on, chosen by `seed`; at least one each where share > 0."""
    if not share:
        return list(examples), []
    if len(examples) < 2:
        raise ConfigError(
            f"got eval_share={share} of {len(examples)} example; wanted two at least; give evaluation data instead"
        )
    held_out = min(max(1, round(share * len(examples))), len(examples) - 1)
    chosen = set(random.Random(seed).sample(range(len(examples)), held_out))
    return (
        [example for index, example in enumerate(examples) if index not in chosen],
        [example for index, example in enumerate(examples) if index in chosen],
    )


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of all tokens and labels, in order: equal for equal data, whatever files it came from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(array("q", example.input_ids + example.labels).tobytes())
    return digest.hexdigest()


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch ``[B, T]`` of input_ids, attention_mask and labels (int64), padded on the right.

    With position_ids too where a row holds several examples.
    """
    import torch

    width = max(len(example.input_ids) for example in examples)
    fill = [width - len(example.input_ids) for example in examples]
    rows = list(zip(examples, fill, strict=True))
    batch = {
        "input_ids": torch.tensor([[*e.input_ids, *[pad_token_id] * n] for e, n in rows]),
        "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * n for e, n in rows]),
        "labels": torch.tensor([[*e.labels, *[IGNORED] * n] for e, n in rows]),
    }
    if any(len(example.starts) > 1 for example in examples):
        batch["position_ids"] = torch.tensor([[*e.positions, *range(n)] for e, n in rows])
    return batch
