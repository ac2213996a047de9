"""Preferences as tokens: a prompt, and two answers to it of which the first is to become likelier than the second."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roadie.training.encoding import IGNORED, Example, ended, rendered, tokens_of, unended
from roadie.training.rows import DataError, Preference, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("roadie")


@dataclass(frozen=True)
class Pair:
    """Token numbers of a prompt, of the answer to be preferred, and of the other one."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def examples(self) -> tuple[Example, Example]:
        """Each answer after the prompt, the answer learnt: what a fingerprint is taken of."""
        masked = (IGNORED,) * len(self.prompt)
        return (
            Example(self.prompt + self.chosen, masked + self.chosen),
            Example(self.prompt + self.rejected, masked + self.rejected),
        )


def encode_pairs(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """The pairs of `records`, prompt and longer answer of at most `max_length` tokens together.

    Where they are more, the prompt loses its beginning, down to half of the length, and then the answers lose their ends.
    Raises `DataError` for a record that is no preference.
    """
    pairs, cut = [], 0
    for record in records:
        if not isinstance(record, Preference):
            raise DataError(
                f"{record.where}: got a row to learn as it is; wanted a preference for method dpo: a prompt, chosen and "
                "rejected; give such rows, or train without --method dpo"
            )
        pair, was_cut = one_pair(record, tokenizer, max_length)
        pairs.append(pair)
        cut += was_cut
    if not pairs:
        raise DataError("got no preference; wanted one at least; check the data")
    if cut:
        logger.warning("cut %d of %d pairs at %d tokens", cut, len(pairs), max_length)
    return pairs


def one_pair(record: Preference, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Pair, bool]:
    """The pair of a record, and whether it was cut; raises as `encode_pairs` does."""
    whole = _pair(record, tokenizer)
    pair = _cut(whole, max_length)
    return pair, pair != whole


def _pair(record: Preference, tokenizer: PreTrainedTokenizerBase) -> Pair:
    if isinstance(record.prompt, str):
        prompt = unended(tokens_of(tokenizer, record.prompt), tokenizer)
        answers = [
            ended(tokens_of(tokenizer, str(text), special=False), tokenizer)
            for text in (record.chosen, record.rejected)
        ]
    else:
        opening = rendered(tokenizer, record.where, record.prompt, opening=True)
        prompt = tokens_of(tokenizer, opening, special=False)
        answers = [_answer(record, turns, opening, tokenizer) for turns in (record.chosen, record.rejected)]
    if not prompt or not all(answers):
        raise DataError(f"{record.where}: got a prompt or an answer without tokens; wanted both; lengthen or remove it")
    return Pair(tuple(prompt), *(tuple(answer) for answer in answers))


def _answer(record: Preference, turns: object, opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a chat template writes for an answer after the opening of the assistant's turn."""
    whole = rendered(tokenizer, record.where, (*record.prompt, *turns))  # type: ignore[misc]
    if not whole.startswith(opening):
        raise DataError(
            f"{record.where}: the chat template writes the prompt otherwise where an answer follows; use texts as prompt, "
            "chosen and rejected"
        )
    return tokens_of(tokenizer, whole[len(opening) :], special=False)


def _cut(pair: Pair, length: int) -> Pair:
    longer = max(len(pair.chosen), len(pair.rejected))
    kept = min(len(pair.prompt), max(length - longer, length // 2))
    room = length - kept
    return Pair(pair.prompt[len(pair.prompt) - kept :], pair.chosen[:room], pair.rejected[:room])
