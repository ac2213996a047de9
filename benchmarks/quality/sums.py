"""Sums of one digit, in three parts that share none, and what a reply to one earns: a reward that anybody can check.

    6 + 2 = 8
    9 - 2 = 7
    7 * 4 =

A model continues these lines. It earns a half for the right number, a quarter where the number has a line of its own, and a
quarter where nothing comes after it. Small models begin with some of the first two and next to nothing of the third, so that
there is a signal from the start, and something to learn.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NUMBER = re.compile(r" ?(\d+)")
LINE = re.compile(r" ?\d+(\n|$)")


@dataclass(frozen=True)
class Sum:
    """``first sign second``, of digits from 1 to 9."""

    first: int
    sign: str
    second: int

    @property
    def asked(self) -> str:
        """All of the line but the result."""
        return f"{self.first} {self.sign} {self.second} ="

    @property
    def result(self) -> int:
        """What is right."""
        return int(SIGNS[self.sign](self.first, self.second))

    @property
    def prompt(self) -> str:
        """What a model is given: two examples, and the question."""
        return "".join(f"{one.asked} {one.result}\n" for one in EXAMPLES) + self.asked


EXAMPLES = (Sum(6, "+", 2), Sum(9, "-", 2))


@dataclass(frozen=True)
class Parts:
    """What is learnt from, what chooses a learning rate, and what is reported."""

    train: Sequence[Sum]
    validation: Sequence[Sum]
    test: Sequence[Sum]


def parts() -> Parts:
    """All sums whose first number is not the smaller one, the examples left out, shuffled: 79, 18 and 36 of them."""
    every = [Sum(a, sign, b) for sign in SIGNS for a in range(1, 10) for b in range(1, a + 1)]
    found = [one for one in every if one not in EXAMPLES]
    random.Random(0).shuffle(found)
    return Parts(train=found[54:], validation=found[36:54], test=found[:36])


def is_right(reply: str, result: int) -> bool:
    """Whether the reply begins with the result."""
    found = NUMBER.match(reply)
    return found is not None and int(found[1]) == result


def is_line(reply: str) -> bool:
    """Whether the reply begins with a number that has a line of its own."""
    return LINE.match(reply) is not None


def is_alone(reply: str) -> bool:
    """Whether the reply is a number and ends there."""
    return NUMBER.fullmatch(reply) is not None


def reward(reply: str, result: int) -> float:
    """From 0 to 1."""
    return 0.5 * is_right(reply, result) + 0.25 * is_line(reply) + 0.25 * is_alone(reply)
