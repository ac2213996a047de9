"""What was measured, in numbers: throughput, and percentiles of times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from roadie.traffic.client import Answer

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """Values in order, milliseconds. Percentiles are nearest ranks: each is a value that was measured."""

    values_ms: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """The smallest value that so many percent do not exceed; NaN where there are none."""
        if not self.values_ms:
            return float("nan")
        rank = max(1, -(-len(self.values_ms) * percent // 100))
        return self.values_ms[int(rank) - 1]

    @property
    def mean(self) -> float:
        """NaN where there are no values."""
        return sum(self.values_ms) / len(self.values_ms) if self.values_ms else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Mean, percentiles, count."""
        if not self.values_ms:
            return {"count": 0}
        named = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {"count": len(self.values_ms), "mean": self.mean, **named, "max": self.values_ms[-1]}


@dataclass(frozen=True)
class Summary:
    """A whole run. seconds: from the first request that was due to the last answer.

    first_token: from when a request was due. between_tokens: between events of one answer. whole: from due to the end.
    """

    num_requests: int
    num_failed: int
    num_models: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    first_token: Distribution
    between_tokens: Distribution
    whole: Distribution
    errors: tuple[str, ...]

    @property
    def requests_per_s(self) -> float:
        """Answered requests a second."""
        return (self.num_requests - self.num_failed) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return self.completion_tokens / self.seconds

    @property
    def distributions(self) -> dict[str, Distribution]:
        """By what they are of."""
        return {
            "time to first token": self.first_token,
            "time between tokens": self.between_tokens,
            "time of a request": self.whole,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, with percentiles in milliseconds."""
        names = ("num_requests", "num_failed", "num_models", "seconds", "prompt_tokens", "completion_tokens", "errors")
        counted = {name: asdict(self)[name] for name in names}
        rates = {"requests_per_s": self.requests_per_s, "tokens_per_s": self.tokens_per_s}
        times = {f"{name.replace(' ', '_')}_ms": each.as_json() for name, each in self.distributions.items()}
        return {**counted, **rates, **times}

    def text(self) -> str:
        """A table for a terminal."""
        lines = [
            f"{self.num_requests} requests of {self.num_models} models in {self.seconds:.2f} s, {self.num_failed} failed",
            f"{self.requests_per_s:.2f} requests a second, {self.tokens_per_s:.1f} generated tokens a second",
            f"{self.prompt_tokens} tokens of prompts, {self.completion_tokens} generated",
            "",
            f"{'milliseconds':<22}{'mean':>9}"
            + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES)
            + f"{'max':>9}",
        ]
        lines += [_row(name, each) for name, each in self.distributions.items()]
        return "\n".join([*lines, *(f"failed: {error}" for error in self.errors)])


def _row(name: str, each: Distribution) -> str:
    values = [each.mean, *(each.percentile(percent) for percent in (*PERCENTILES, 100))]
    return f"{name:<22}" + "".join(f"{value:>9.1f}" for value in values)


def _distribution(seconds: Iterable[float]) -> Distribution:
    return Distribution(tuple(sorted(1000 * value for value in seconds)))


def summarise(answers: Sequence[Answer]) -> Summary:
    """The numbers of a run."""
    good = [answer for answer in answers if answer.error is None]
    seconds = max(answer.end_s for answer in answers) - min(answer.due_s for answer in answers)
    errors = sorted({answer.error for answer in answers if answer.error is not None})
    return Summary(
        num_requests=len(answers),
        num_failed=len(answers) - len(good),
        num_models=len({answer.arrival.model for answer in answers}),
        seconds=max(seconds, 1e-9),
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        completion_tokens=sum(answer.completion_tokens for answer in good),
        first_token=_distribution(answer.token_times_s[0] - answer.due_s for answer in good if answer.token_times_s),
        between_tokens=_distribution(
            later - earlier for answer in good for earlier, later in pairwise(answer.token_times_s)
        ),
        whole=_distribution(answer.end_s - answer.due_s for answer in good),
        errors=tuple(errors[:5]),
    )
