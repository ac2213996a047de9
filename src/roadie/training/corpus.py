"""Texts as tokens: what a training learns from and what its loss is measured on, and samples that models are run on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roadie.errors import ConfigError
from roadie.training.encoding import Example, encode, fingerprint, split
from roadie.training.models import ModelSource, context_length, load_tokenizer
from roadie.training.packing import pack
from roadie.training.preferences import Pair, encode_pairs
from roadie.training.recipe import Recipe
from roadie.training.record import Sources
from roadie.training.text import check_there, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("roadie")

MOST_ROW_TOKENS = 512
SAMPLE_SIZE = 128
"""Training examples whose loss is reported where no evaluation data are given."""


@dataclass(frozen=True)
class Corpus:
    """Examples, or pairs of answers: those of the data, those held out, and the rows that a step takes its batch from."""

    learnt: list[Any]
    held_out: list[Any]
    rows: list[Any]
    max_length: int

    @property
    def measured(self) -> list[Any]:
        """Those whose loss is reported."""
        return self.held_out or self.learnt[:SAMPLE_SIZE]

    @property
    def measured_name(self) -> str:
        """What the reported losses are losses of."""
        if self.held_out:
            return "held-out data"
        return "training data" if len(self.learnt) <= SAMPLE_SIZE else f"first {SAMPLE_SIZE} training examples"

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """SHA-256 of what is learnt and of what is held out (None: nothing)."""
        return {
            "data_sha256": fingerprint(_examples(self.learnt)),
            "evaluation_sha256": fingerprint(_examples(self.held_out)) if self.held_out else None,
        }


def _examples(items: list[Any]) -> list[Example]:
    return [example for item in items for example in (item.examples if isinstance(item, Pair) else (item,))]


@dataclass(frozen=True)
class TextSettings:
    """A text to run models on, and how much of it: files or folders as `roadie train` reads them, and tokens at most."""

    sources: tuple[str, ...]
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ConfigError(f"got tokens={self.tokens}; wanted two at least; leave it out for {type(self).tokens}")

    def examples(self, source: ModelSource) -> list[Example]:
        """The text in rows that the model has room for; the last one is cut where the tokens are used up."""
        longest = min(MOST_ROW_TOKENS, context_length(source) or MOST_ROW_TOKENS)
        chosen, left = [], self.tokens
        for example in encode(read(self.sources), load_tokenizer(source), longest):
            if left < 1:
                break
            chosen.append(Example(example.input_ids[:left], example.labels[:left]))
            left -= len(example.input_ids)
        return chosen


def prepare_corpus(data: Sources, eval_data: Sources | None, source: ModelSource, recipe: Recipe) -> Corpus:
    """Read, encode and split the data; raises `RoadieError` for data, and settings of them, that cannot be used."""
    _check_evaluation(eval_data, recipe)
    for sources in (data, eval_data or ()):
        check_there(sources)
    tokenizer = load_tokenizer(source)
    max_length = min(recipe.max_length, context_length(source) or recipe.max_length)
    if max_length < recipe.max_length:
        logger.info("examples have at most %d tokens, the context length of %s", max_length, source.place)
    learnt, held_out = learnt_and_held_out(data, eval_data, tokenizer, recipe, max_length)
    return Corpus(learnt, held_out, pack(learnt, max_length) if recipe.packing else learnt, max_length)


def learnt_and_held_out(
    data: Sources, eval_data: Sources | None, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, max_length: int
) -> tuple[list[Any], list[Any]]:
    """The examples, or pairs, of the data, and those to measure on: of `eval_data`, else a share of the data, maybe none."""
    preferences = recipe.method == "dpo"

    def encoded(sources: Sources) -> list[Any]:
        records = read(sources, preferences=preferences)
        return (encode_pairs if preferences else encode)(records, tokenizer, max_length)

    if eval_data is None:
        return split(encoded(data), recipe.eval_share, recipe.seed)
    return encoded(data), encoded(eval_data)


def _check_evaluation(eval_data: Sources | None, recipe: Recipe) -> None:
    if eval_data is not None and recipe.eval_share:
        raise ConfigError("got evaluation data and eval_share; wanted one of them; leave one out")
    if recipe.patience is not None and eval_data is None and not recipe.eval_share:
        raise ConfigError(
            f"got patience={recipe.patience} and nothing held out; wanted a loss to wait for; give evaluation data "
            "(--eval-data) or a share of the data (--eval-share)"
        )
