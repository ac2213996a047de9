"""Likelihoods of continuations, from scored prompts: as few and as short as they can be.

    context + continuation                                  one prompt, whose last tokens are scored
    continuations that differ in their last token alone     one prompt, at whose last place all of these are scored
    contexts that are equal                                 one after another: the later ones find the blocks of the first

So one forward answers a question with four answers of a letter each, and a context is read once for all of its answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

from roadie.serving.engine import Scoring, TokenLogprob

Pair: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a context, and those of a continuation; neither is empty."""
Likelihood: TypeAlias = tuple[float, bool]
"""ln p of a continuation, and whether each of its tokens is the most likely one."""


@dataclass(frozen=True)
class Question:
    """One prompt, and the continuations that it scores: they end with one of `ends` each, and are equal but for that."""

    context: tuple[int, ...]
    middle: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The last token is not read: it only says where the ends stand."""
        return (*self.context, *self.middle, self.ends[0])

    @property
    def scoring(self) -> Scoring:
        """What is asked of the prompt."""
        return Scoring(last=len(self.middle) + 1, top=1, token_ids=self.ends)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What it answers."""
        return tuple((self.context, (*self.middle, end)) for end in self.ends)

    def answers(self, scored: Sequence[TokenLogprob]) -> tuple[Likelihood, ...]:
        """The likelihoods of `pairs`."""
        *middle, last = scored
        so_far = sum(entry.logprob for entry in middle)
        is_greedy = all(entry.rank == 1 for entry in middle)
        best = last.top[0][1]
        return tuple((so_far + logprob, is_greedy and logprob == best) for _, logprob in last.others)


def questions_of(pairs: Iterable[Pair]) -> list[Question]:
    """The fewest questions that answer these pairs, each once."""
    ends: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, None]] = {}
    for context, continuation in pairs:
        ends.setdefault((context, continuation[:-1]), {})[continuation[-1]] = None
    return [Question(context, middle, tuple(last)) for (context, middle), last in ends.items()]


def in_waves(questions: Iterable[Question], num_tokens: int) -> Iterator[Question]:
    """The same questions, in an order in which equal contexts lie at least so many tokens apart, where there are others.

    Who starts in the same step as another cannot share its blocks yet; who comes much later finds them gone.
    """
    by_context: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        by_context.setdefault(question.context, []).append(question)
    wave: list[list[Question]] = []
    size = 0
    for same in by_context.values():
        wave.append(same)
        size += len(same[0].prompt_ids)
        if size >= num_tokens:
            yield from _across(wave)
            wave, size = [], 0
    yield from _across(wave)


def _across(wave: list[list[Question]]) -> Iterator[Question]:
    for firsts in zip_longest(*wave):
        yield from (question for question in firsts if question is not None)


def truncated(pair: Pair, max_length: int) -> Pair:
    """The end of a pair, of which a model reads all but the last token: at most max_length of them, one of the context's."""
    context, continuation = pair
    num_kept = max(1, max_length + 1 - len(continuation))
    return context[-num_kept:], continuation
