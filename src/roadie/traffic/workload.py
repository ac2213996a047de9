"""What is asked for, of which adapter, and when: drawn beforehand, so that the same seed gives the same requests."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from roadie.errors import ConfigError

_TEXT = (
    "the turtle draws a line and turns left before it goes on to the next corner where an event loop waits for work that never "
    "comes so every reader of this text may ask what a list of names is for when nobody has called any of them yet"
)
WORDS = _TEXT.split()


class Popularity(str, Enum):
    """Which models requests ask for."""

    IDENTICAL = "identical"  # all the first
    UNIFORM = "uniform"  # any, equally often
    ZIPF = "zipf"  # the k-th with weight k ** -skew
    DISTINCT = "distinct"  # one after another, so that neighbours differ


@dataclass(frozen=True)
class Workload:
    """How much is asked for. Raises `ConfigError` for values that make no sense.

    models: names as the server knows them. rate_per_s: requests a second, at random times (Poisson); None: at once.
    prompt_words, max_tokens: means; spread: lengths are drawn evenly from (1 - spread) to (1 + spread) times the mean.
    shared_words: of each prompt, the same in all. skew: of zipf.
    """

    models: tuple[str, ...]
    popularity: Popularity = Popularity.UNIFORM
    num_requests: int = 100
    rate_per_s: float | None = None
    prompt_words: int = 32
    shared_words: int = 0
    max_tokens: int = 32
    spread: float = 0.0
    skew: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("got no models to ask for; wanted one at least; name them, or load adapters")
        for name in ("num_requests", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"got {name}={getattr(self, name)}; wanted 1 or more")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < math.inf:
            raise ConfigError(f"got rate_per_s={self.rate_per_s}; wanted a number above 0, or None")
        if not 0 <= self.spread < 1 or not 0 <= self.skew < 100:
            raise ConfigError(f"got spread={self.spread}, skew={self.skew}; wanted 0 to 1, and 0 to 100")
        if not 0 <= self.shared_words <= self.prompt_words:
            raise ConfigError(f"got shared_words={self.shared_words}; wanted 0 to prompt_words={self.prompt_words}")


@dataclass(frozen=True)
class Arrival:
    """One request. at_s: seconds after the beginning."""

    at_s: float
    model: str
    prompt: str
    max_tokens: int


def plan(workload: Workload) -> tuple[Arrival, ...]:
    """The requests of a workload, in the order of their times."""
    draw = random.Random(workload.seed)
    shared = [draw.choice(WORDS) for _ in range(workload.shared_words)]
    times = _times(workload, draw)
    models = _models(workload, draw)
    return tuple(
        Arrival(at_s, model, _prompt(workload, shared, draw), _about(workload.max_tokens, workload, draw))
        for at_s, model in zip(times, models, strict=True)
    )


def _times(workload: Workload, draw: random.Random) -> list[float]:
    if workload.rate_per_s is None:
        return [0.0] * workload.num_requests
    return list(accumulate(draw.expovariate(workload.rate_per_s) for _ in range(workload.num_requests)))


def _models(workload: Workload, draw: random.Random) -> list[str]:
    models, count = workload.models, workload.num_requests
    if workload.popularity is Popularity.IDENTICAL:
        return [models[0]] * count
    if workload.popularity is Popularity.DISTINCT:
        return [models[number % len(models)] for number in range(count)]
    skew = workload.skew if workload.popularity is Popularity.ZIPF else 0.0
    return draw.choices(models, [rank**-skew for rank in range(1, len(models) + 1)], k=count)


def _about(mean: int, workload: Workload, draw: random.Random) -> int:
    return max(1, round(mean * draw.uniform(1 - workload.spread, 1 + workload.spread)))


def _prompt(workload: Workload, shared: list[str], draw: random.Random) -> str:
    length = max(_about(workload.prompt_words, workload, draw), len(shared) + 1)
    return " ".join([*shared, *(draw.choice(WORDS) for _ in range(length - len(shared)))])
