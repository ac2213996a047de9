"""A learning rate for the impatient: short training runs on a geometric grid, each from the same start.

    search = find_learning_rate(["texts.jsonl"], recipe=Recipe(variant="road_2"))
    search.learning_rate, search.trials

Every trial trains the adapter for `steps` steps with the recipe's schedule, on the same batches, and measures the loss
on examples that no trial learns from; then the adapter is put back. From the first rate the search goes to its neighbours,
a factor of sqrt(10) apart, until the best rate has a worse one on both sides: 3 to 6 trials as a rule.

`RateSearch.doubts` says when such a search was too short to trust: by the differences between the same held-out examples.

Short runs like high rates: for a training of many epochs take the rate found, or the one below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from roadie.errors import ConfigError
from roadie.training.corpus import prepare_corpus
from roadie.training.encoding import Example, collate, split
from roadie.training.many.schedule import learning_rate as scheduled_rate
from roadie.training.models import ModelSource, as_source, best_device, hidden_size, training_dtype
from roadie.training.recipe import Recipe
from roadie.training.record import Sources
from roadie.training.run import adapted_model

FACTOR = math.sqrt(10)
STEPS = 32
MOST_TRIALS = 9
MEASURED_SHARE, MOST_MEASURED = 0.2, 64
LOWEST, HIGHEST = 1e-6, 0.9
MEASURED_PARTS = 16
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
    of `recipe.batch_size` examples each. on_trial: is told of each trial when it has ended.
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
    adapted = adapted_model(source, recipe).to(best_device())
    pad = adapted.config.pad_token_id or 0
    return search(adapted, learnt, measured, recipe, steps=steps, pad_token_id=pad, on_trial=on_trial)


def _check_plain(recipe: Recipe) -> None:
    """Raise `ConfigError` for settings that a search has no use for, and whose rate it would not find."""
    for name in ("method", "packing", "patience"):
        value = getattr(recipe, name)
        if value != getattr(Recipe(), name):
            raise ConfigError(
                f"got {name}={value!r}; wanted none in a search of a rate, which cannot have it; leave it out"
            )


def search(
    model: nn.Module,
    learnt: Sequence[Example],
    measured: Sequence[Example],
    recipe: Recipe,
    *,
    steps: int = STEPS,
    pad_token_id: int = 0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> RateSearch:
    """The search on an adapted model, whose trainable parameters, mode and random state are as before afterwards."""
    recipe = recipe.for_width(getattr(getattr(model, "config", None), "hidden_size", None))
    bench = _Bench(model, learnt, measured, recipe, steps, pad_token_id)
    trials: dict[float, Trial] = {}
    with _put_back(model):
        before = bench.parts()
        rate: float | None = recipe.peak_rate
        while rate is not None and len(trials) < MOST_TRIALS:
            with _put_back(model):
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
    """What all trials share."""

    model: nn.Module
    learnt: Sequence[Example]
    measured: Sequence[Example]
    recipe: Recipe
    steps: int
    pad_token_id: int

    def trial(self, rate: float) -> Trial:
        """Train at a rate from where the model is; the held-out loss is infinite where training or loss is not finite."""
        if not self._trained(rate):
            return Trial(rate, math.inf, DIVERGED)
        parts = self.parts()
        loss = _mean(parts)
        return Trial(rate, loss, parts) if math.isfinite(loss) else Trial(rate, math.inf, DIVERGED)

    def _trained(self, rate: float) -> bool:
        """Train at a rate; whether all losses were finite."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=self.recipe.weight_decay)
        self.model.train()
        for step, batch in zip(range(self.steps), self._batches(), strict=False):
            # the schedule starts at a rate of 0, which would be a lost step here
            share = scheduled_rate(self.recipe, step + 1, self.steps + 1) / self.recipe.peak_rate
            optimizer.param_groups[0]["lr"] = rate * share
            if not self._backward(batch):
                return False
            if self.recipe.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return True

    def parts(self) -> Parts:
        """The losses of the learnt tokens of the held-out examples, and how many these are, a few examples at a time."""
        self.model.eval()
        size = min(math.ceil(len(self.measured) / MEASURED_PARTS), self.recipe.micro_batch_size or MEASURED_PARTS)
        with torch.no_grad():
            sums = [self._summed(part) for part in _cut(self.measured, size)]
        return tuple((float(nats), count) for nats, count in sums)

    def _backward(self, batch: Sequence[Example]) -> bool:
        """Gradients of the mean loss of a batch, in passes of micro_batch_size; whether the loss is finite."""
        count = sum(label != -100 for example in batch for label in example.labels[1:])
        total = 0.0
        for part in self._parts(batch):
            loss, _ = self._summed(part)
            (loss / max(1, count)).backward()
            total += float(loss.detach())
        return math.isfinite(total)

    def _summed(self, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """The sum of the losses of the learnt tokens, and how many these are."""
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in collate(examples, self.pad_token_id).items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        half = training_dtype(self.recipe.precision) is torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return self.model(**batch, use_cache=False).loss * count, count

    def _parts(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        return _cut(examples, self.recipe.micro_batch_size or self.recipe.batch_size)

    def _batches(self) -> Iterator[list[Example]]:
        """Without end, and the same for every trial: each example once before any again."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < self.recipe.batch_size:
                waiting += torch.randperm(len(self.learnt), generator=generator).tolist()
            chosen, waiting = waiting[: self.recipe.batch_size], waiting[self.recipe.batch_size :]
            yield [self.learnt[index] for index in chosen]


def _cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))


def _mean(parts: Parts) -> float:
    """Nats a token."""
    return sum(nats for nats, _ in parts) / sum(count for _, count in parts)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards the trainable parameters, their gradients, the mode of every module and the random state are as before."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trainable]
    gradients = [parameter.grad for parameter in trainable]
    modes = {module: module.training for module in model.modules()}
    for parameter in trainable:
        parameter.grad = None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(trainable, values, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
