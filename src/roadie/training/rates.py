"""A learning rate for the impatient: short training runs on a geometric grid, each from the same start.

    search = find_learning_rate(["texts.jsonl"], recipe=Recipe(variant="road_2"))
    search.learning_rate, search.trials

Every trial trains an adapter of its own for `steps` steps with the recipe's schedule, by a `TrainingEngine`, on the same
batches, and measures the loss on examples that no trial learns from. From the first rate the search goes to its neighbours,
a factor of sqrt(10) apart, until the best rate has a worse one on both sides: 3 to 6 trials as a rule.

`RateSearch.doubts` says when such a search was too short to trust: by the differences between the same held-out examples.

Short runs like high rates: for a training of many epochs take the rate found, or the one below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from roadie.adapter import is_input
from roadie.bank.families import AdaptedLayer
from roadie.engine import AdamSettings, TrainingEngine, TrainingSettings
from roadie.engine.targets import adapted_layers
from roadie.errors import ConfigError
from roadie.training.corpus import prepare_corpus
from roadie.training.encoding import Example, split
from roadie.training.group_sizes import tell_of_smaller_groups
from roadie.training.many.data import Order
from roadie.training.many.schedule import learning_rate as scheduled_rate
from roadie.training.many.session import learnt_tokens, loss_of, norm_of, row_of
from roadie.training.models import ModelSource, as_source, best_device, hidden_size, load_model, training_dtype
from roadie.training.recipe import Recipe
from roadie.training.record import Sources
from roadie.tuner import prepare_quantised

FACTOR = math.sqrt(10)
STEPS = 32
MOST_TRIALS = 9
MEASURED_SHARE, MOST_MEASURED = 0.2, 64
LOWEST, HIGHEST = 1e-6, 0.9
MEASURED_PARTS = 16
TRIED = "tried"
CERTAIN = 2.0
"""Standard errors that a difference must have; chance alone reaches them once in twenty times."""

Parts = tuple[tuple[float, int], ...]
"""The sum of the losses (nats) and the number of learnt tokens of each batch of held-out examples."""
DIVERGED: Parts = ((math.inf, 1),)


@dataclass(frozen=True)
class Trial:
    """One short training: its learning rate, and the held-out loss after it (nats a token; infinite: it diverged).

    parts: of that loss, by batches of held-out examples.
    """

    learning_rate: float
    loss: float
    parts: Parts = ()


@dataclass(frozen=True)
class RateSearch:
    """What a search found. trials: in the order of their rates; loss_before: of the adapter as it started, nats a token.

    parts_before: of that loss, by the same batches as those of the trials.
    """

    trials: tuple[Trial, ...]
    loss_before: float
    steps: int
    parts_before: Parts = ()

    @property
    def best(self) -> Trial:
        """The trial of the lowest loss."""
        return min(self.trials, key=lambda trial: trial.loss)

    @property
    def learning_rate(self) -> float:
        """The rate of the lowest loss."""
        return self.best.learning_rate

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the rate should not be trusted: it is at the edge of what was tried, or chance may have chosen it."""
        place, best = self.trials.index(self.best), self.best
        found = []
        if place in (0, len(self.trials) - 1):
            edge = "lowest" if place == 0 else "highest"
            found.append(
                f"{best.learning_rate:g} is the {edge} rate that was tried, so that a better one may lie beyond"
            )
        for other in self.trials[max(0, place - 1) : place + 2]:
            if other is not best and not _is_certain(other.parts, best.parts):
                worse = f"{other.learning_rate:g} is worse than {best.learning_rate:g} by {other.loss - best.loss:.4f}"
                found.append(f"{worse}, which is {_noise(other.parts, best.parts)}")
        if self.improves and not _is_certain(self.parts_before, best.parts):
            moved = f"the loss moved by {self.loss_before - best.loss:.4f} alone"
            found.append(f"{moved}, which is {_noise(self.parts_before, best.parts)}")
        return tuple(found)

    @property
    def improves(self) -> bool:
        """Whether any rate made the loss smaller."""
        return min(trial.loss for trial in self.trials) < self.loss_before


def difference(worse: Parts, better: Parts) -> tuple[float, float]:
    """How much more nats a token the first has than the second, and the standard error of that.

    The same batches of examples are compared, so that what makes some of them harder cancels; the error is that of a ratio
    of sums (of nats, of tokens) over batches that stand for others. It is infinite for fewer than two.
    """
    counts = [count for _, count in better]
    gaps = [ours[0] - theirs[0] for ours, theirs in zip(worse, better, strict=True)]
    number, total = len(counts), sum(counts)
    if number < 2:
        return math.nan, math.inf
    mean = sum(gaps) / total
    squares = sum((gap - mean * count) ** 2 for gap, count in zip(gaps, counts, strict=True))
    return mean, math.sqrt(number / (number - 1) * squares) / total


def _is_certain(worse: Parts, better: Parts) -> bool:
    """Whether chance does not explain a difference. One that diverged is worse for certain."""
    if worse and not all(math.isfinite(nats) for nats, _ in worse):
        return True
    gap, error = difference(worse, better)
    return gap > CERTAIN * error


def _noise(worse: Parts, better: Parts) -> str:
    _, error = difference(worse, better)
    if math.isinf(error):
        return "of too few held-out examples to tell from chance"
    return f"within the noise between held-out examples ({CERTAIN * error:.4f})"


def find_learning_rate(
    data: Sources,
    *,
    model: str | ModelSource | None = None,
    recipe: Recipe | None = None,
    steps: int = STEPS,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> RateSearch:
    """Search a peak learning rate for training on `data` (see `roadie.training.text`) with `recipe`; writes nothing.

    The search starts at the recipe's own rate, or at the default for the model's width. steps: optimizer steps of a trial,
    of `recipe.batch_size` examples each; to save memory, lower `recipe.micro_batch_size` (gradient_checkpointing does nothing
    here). on_trial: is told of each trial when it has ended.
    Raises `RoadieError` for settings, texts and models that cannot be used.
    """
    source = as_source(model)
    _check_plain(recipe or Recipe())
    if steps < 2:
        raise ConfigError(f"got steps={steps}; wanted at least 2; try {STEPS}")
    asked = replace(recipe or Recipe(), eval_share=0.0)
    examples = prepare_corpus(data, None, source, asked).learnt
    recipe = asked.for_width(hidden_size(source))
    share = min(MEASURED_SHARE, MOST_MEASURED / len(examples))
    learnt, measured = split(examples, share, recipe.seed)
    base = load_model(source, training_dtype(recipe.precision), in_4bit=recipe.load_in_4bit)
    base = prepare_quantised(base) if recipe.load_in_4bit else base
    return search(base.to(best_device()), learnt, measured, recipe, steps=steps, on_trial=on_trial)


def _check_plain(recipe: Recipe) -> None:
    """Raise `ConfigError` for settings that a search has no use for, and whose rate it would not find."""
    for name in ("method", "packing", "patience"):
        value = getattr(recipe, name)
        if value != getattr(Recipe(), name):
            raise ConfigError(
                f"got {name}={value!r}; wanted none in a search of a rate, which cannot have it; leave it out"
            )


def search(
    model: Any,
    learnt: Sequence[Example],
    measured: Sequence[Example],
    recipe: Recipe,
    *,
    steps: int = STEPS,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> RateSearch:
    """The search on a base model, which is frozen, and whose weights stay as they are."""
    recipe = recipe.for_width(getattr(model.config, "hidden_size", None))
    layers = adapted_layers(model, recipe.to_mapping())
    sizes = ((layer.path, layer.stages) for layer in layers if not is_input(layer.path))
    tell_of_smaller_groups(sizes, recipe.stages or (recipe.group_size,))
    most_tokens = (recipe.micro_batch_size or recipe.batch_size) * max(len(e.input_ids) for e in (*learnt, *measured))
    engine = TrainingEngine(model, TrainingSettings(max_tokens_per_pass=most_tokens))
    bench = _Bench(engine, layers, learnt, measured, recipe, steps)
    before = bench.parts_before()
    trials: dict[float, Trial] = {}
    rate: float | None = recipe.peak_rate
    while rate is not None and len(trials) < MOST_TRIALS:
        trials[rate] = bench.trial(rate)
        on_trial(trials[rate])
        rate = following({tried: trial.loss for tried, trial in trials.items()})
    return RateSearch(tuple(trials[rate] for rate in sorted(trials)), _mean(before), steps, before)


def following(losses: dict[float, float]) -> float | None:
    """The rate to try next: a neighbour of the best that was not tried; None where there is none left."""
    best = min(losses, key=lambda rate: (losses[rate], rate))
    for neighbour in (_rounded(best * FACTOR), _rounded(best / FACTOR)):
        if LOWEST <= neighbour <= HIGHEST and not any(math.isclose(neighbour, rate, rel_tol=0.1) for rate in losses):
            return neighbour
    return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


@dataclass(frozen=True)
class _Bench:
    """What all trials share; each has an adapter of its own, one after the other."""

    engine: TrainingEngine
    layers: Sequence[AdaptedLayer]
    learnt: Sequence[Example]
    measured: Sequence[Example]
    recipe: Recipe
    steps: int

    def parts_before(self) -> Parts:
        """The held-out losses with an adapter that has learnt nothing."""
        with self._fresh_adapter():
            return self._parts()

    def trial(self, rate: float) -> Trial:
        """Train at a rate; the held-out loss is infinite where training or loss is not finite."""
        with self._fresh_adapter():
            parts = self._parts() if self._trained(rate) else DIVERGED
        loss = _mean(parts)
        return Trial(rate, loss, parts) if math.isfinite(loss) else Trial(rate, math.inf, DIVERGED)

    @contextmanager
    def _fresh_adapter(self) -> Iterator[None]:
        self.engine.create(TRIED, self.recipe.of_adapter, layers=self.layers)
        yield
        self.engine.remove(TRIED)
        self.engine.run()

    def _trained(self, rate: float) -> bool:
        """Train at a rate, each example once before any again; whether all losses and gradients were finite."""
        recipe = replace(self.recipe, learning_rate=rate)
        order = Order(len(self.learnt), recipe.batch_size, recipe.seed)
        for step in range(self.steps):
            batch = [self.learnt[place] for place in order.places(step)]
            weight = 1 / max(1, sum(map(learnt_tokens, batch)))
            loss = self.engine.forward_backward(TRIED, [row_of(each, weight) for each in batch], "cross_entropy")
            # the schedule starts at a rate of 0, which would be a lost step here
            now = scheduled_rate(recipe, step + 1, self.steps + 1)
            done = self.engine.optim_step(TRIED, AdamSettings(now, recipe.weight_decay, recipe.max_grad_norm))
            self.engine.run()
            if not (math.isfinite(loss_of(loss)) and math.isfinite(norm_of(done))):
                return False
        return True

    def _parts(self) -> Parts:
        """The losses of the learnt tokens of the held-out examples, and how many these are, a few examples at a time."""
        size = math.ceil(len(self.measured) / MEASURED_PARTS)
        parts = [self.measured[start : start + size] for start in range(0, len(self.measured), size)]
        losses = [
            self.engine.forward(TRIED, [row_of(each, 1.0) for each in part], "cross_entropy", all_logprobs=False)
            for part in parts
        ]
        self.engine.run()
        return tuple((loss_of(loss), sum(map(learnt_tokens, part))) for loss, part in zip(losses, parts, strict=True))


def _mean(parts: Parts) -> float:
    """Nats a token."""
    return sum(nats for nats, _ in parts) / sum(count for _, count in parts)
