"""A learning rate for the impatient: short training runs on a geometric grid, each from the same start.

    search = find_learning_rate(["texts.jsonl"], recipe=Recipe(variant="road_2"))
    search.learning_rate, search.trials

Every trial trains the adapter for `steps` steps with the recipe's schedule, on the same batches, and measures the loss
on examples that no trial learns from; then the adapter is put back. From the first rate the search goes to its neighbours,
a factor of sqrt(10) apart, until the best rate has a worse one on both sides: 3 to 6 trials as a rule.

Short runs like high rates: for a training of many epochs take the rate found, or the one below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roadie.errors import ConfigError
from roadie.training.encoding import Example, collate, encode, split
from roadie.training.many.schedule import learning_rate as scheduled_rate
from roadie.training.models import (
    ModelSource,
    as_source,
    best_device,
    context_length,
    hidden_size,
    load_tokenizer,
    training_dtype,
)
from roadie.training.recipe import Recipe
from roadie.training.record import Sources
from roadie.training.run import adapted_model
from roadie.training.text import read

FACTOR = math.sqrt(10)
STEPS = 32
MOST_TRIALS = 9
MEASURED_SHARE, MOST_MEASURED = 0.2, 64
LOWEST, HIGHEST = 1e-6, 0.9


@dataclass(frozen=True)
class Trial:
    """One short training: its learning rate, and the held-out loss after it (nats a token; infinite: it diverged)."""

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class RateSearch:
    """What a search found. trials: in the order of their rates; loss_before: of the adapter as it started, nats a token."""

    trials: tuple[Trial, ...]
    loss_before: float
    steps: int

    @property
    def learning_rate(self) -> float:
        """The rate of the lowest loss."""
        return min(self.trials, key=lambda trial: trial.loss).learning_rate

    @property
    def improves(self) -> bool:
        """Whether any rate made the loss smaller."""
        return min(trial.loss for trial in self.trials) < self.loss_before


def find_learning_rate(
    data: Sources, *, model: str | ModelSource | None = None, recipe: Recipe | None = None, steps: int = STEPS
) -> RateSearch:
    """Search a peak learning rate for training on `data` (see `roadie.training.text`) with `recipe`; writes nothing.

    The search starts at the recipe's own rate, or at the default for the model's width. steps: optimizer steps of a trial,
    of `recipe.batch_size` examples each.
    Raises `RoadieError` for settings, texts and models that cannot be used.
    """
    source = as_source(model)
    if steps < 2:
        raise ConfigError(f"got steps={steps}; wanted at least 2; try {STEPS}")
    recipe, tokenizer = (recipe or Recipe()).for_width(hidden_size(source)), load_tokenizer(source)
    length = min(recipe.max_length, context_length(source) or recipe.max_length)
    examples = encode(read(data), tokenizer, length)
    share = min(MEASURED_SHARE, MOST_MEASURED / len(examples))
    learnt, measured = split(examples, share, recipe.seed)
    adapted = adapted_model(source, recipe).to(best_device())
    return search(adapted, learnt, measured, recipe, steps=steps, pad_token_id=adapted.config.pad_token_id or 0)


def search(
    model: nn.Module,
    learnt: Sequence[Example],
    measured: Sequence[Example],
    recipe: Recipe,
    *,
    steps: int = STEPS,
    pad_token_id: int = 0,
) -> RateSearch:
    """The search on an adapted model, whose trainable parameters, mode and random state are as before afterwards."""
    recipe = recipe.for_width(getattr(getattr(model, "config", None), "hidden_size", None))
    bench = _Bench(model, learnt, measured, recipe, steps, pad_token_id)
    losses: dict[float, float] = {}
    with _put_back(model):
        before = bench.loss()
        rate: float | None = recipe.peak_rate
        while rate is not None and len(losses) < MOST_TRIALS:
            with _put_back(model):
                losses[rate] = bench.trial(rate)
            rate = following(losses)
    trials = tuple(Trial(rate, losses[rate]) for rate in sorted(losses))
    return RateSearch(trials, before, steps)


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

    def trial(self, rate: float) -> float:
        """Train at a rate from where the model is; the held-out loss, infinite where training or loss is not finite."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=self.recipe.weight_decay)
        self.model.train()
        for step, batch in zip(range(self.steps), self._batches(), strict=False):
            # the schedule starts at a rate of 0, which would be a lost step here
            share = scheduled_rate(self.recipe, step + 1, self.steps + 1) / self.recipe.peak_rate
            optimizer.param_groups[0]["lr"] = rate * share
            if not self._backward(batch):
                return math.inf
            if self.recipe.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        return loss if math.isfinite(loss) else math.inf

    def loss(self) -> float:
        """The mean loss over the learnt tokens of the held-out examples."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for part in self._parts(self.measured):
                loss, learnt = self._summed(part)
                total, count = total + float(loss), count + learnt
        return total / count

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
        size = self.recipe.micro_batch_size or self.recipe.batch_size
        return (examples[start : start + size] for start in range(0, len(examples), size))

    def _batches(self) -> Iterator[list[Example]]:
        """Without end, and the same for every trial: each example once before any again."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < self.recipe.batch_size:
                waiting += torch.randperm(len(self.learnt), generator=generator).tolist()
            chosen, waiting = waiting[: self.recipe.batch_size], waiting[self.recipe.batch_size :]
            yield [self.learnt[index] for index in chosen]


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards the trainable parameters, their gradients, the mode of every module and the random state are as before."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trainable]
    gradients = [parameter.grad for parameter in trainable]
    modes = {module: module.training for module in model.modules()}
    restore_random = _random_state()
    for parameter in trainable:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(trainable, values, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        restore_random()


def _random_state() -> Callable[[], None]:
    state = torch.get_rng_state()
    accelerator = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def restore() -> None:
        torch.set_rng_state(state)
        if accelerator is not None:
            torch.cuda.set_rng_state_all(accelerator)

    return restore
