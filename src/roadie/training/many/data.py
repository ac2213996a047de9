"""The data of a job: its examples, and which of them each of its steps sees.

The order depends on the job's seed alone: pass e over N examples is a permutation drawn with (seed, e), and step s takes
the next `batch_size` examples of this endless row. So a step can be found again from its number, and nobody's neighbours
matter.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from roadie.training.corpus import learnt_and_held_out
from roadie.training.encoding import Example, fingerprint
from roadie.training.many.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Order:
    """Which of so many examples each step sees."""

    num_examples: int
    batch_size: int
    seed: int
    _order: dict[int, list[int]] = field(default_factory=dict)

    def places(self, step: int) -> list[int]:
        """Those of the step number `step`, from 0."""
        first = step * self.batch_size
        return [self._place(index) for index in range(first, first + self.batch_size)]

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, self.num_examples)
        if epoch not in self._order:
            order = list(range(self.num_examples))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = {number: kept for number, kept in self._order.items() if number == epoch - 1}
            self._order[epoch] = order
        return self._order[epoch][place]


@dataclass
class JobData:
    """Examples to learn from and held-out ones (maybe none)."""

    train: list[Example]
    held_out: list[Example]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self._order = Order(len(self.train), self.batch_size, self.seed)

    def rows(self, step: int) -> list[Example]:
        """The examples of the step number `step`, from 0."""
        return [self.train[place] for place in self._order.places(step)]

    @property
    def fingerprint(self) -> str:
        """Equal for equal examples in the same order."""
        return fingerprint([*self.train, *self.held_out]) + f":{len(self.held_out)}"


def load_data(job: Job, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> JobData:
    """Read and encode the data of `job`; raises `DataError`, naming file and line, where they cannot be used."""
    recipe = job.recipe
    max_length = min(recipe.max_length, context_length or recipe.max_length)
    parts = learnt_and_held_out(job.data, job.eval_data, tokenizer, recipe, max_length)
    return JobData(*parts, recipe.batch_size, recipe.seed)


def steps_of(job: Job, data: JobData) -> int:
    """Optimizer steps of a job: as its recipe says, or its epochs over the data."""
    recipe = job.recipe
    return recipe.max_steps or math.ceil(recipe.epochs * len(data.train) / recipe.batch_size)
