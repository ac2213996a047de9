"""What guidellm found, model by model: who waited for how long, and how fairly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MOST_ROWS = 12


@dataclass(frozen=True)
class Fared:
    """How the requests for one model fared. Percentiles are nearest ranks: each is a value that was measured."""

    requests: int
    tokens: int
    first_token_ms: float
    first_token_p99_ms: float
    between_tokens_ms: float
    whole_ms: float


@dataclass(frozen=True)
class Found:
    """Of one run. fairness: Jain's index of the models' mean times to first token: 1 where all wait as long, else down to 1/n.

    failed: requests, whose models guidellm does not keep.
    """

    title: str
    models: Mapping[str, Fared]
    fairness: float
    failed: int

    def as_json(self) -> dict[str, Any]:
        """Everything; null where nothing was measured."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def text(self) -> str:
        """A table for a terminal, of the models that were asked for most."""
        width = max(map(len, [*self.models, "model"]))
        head = ("requests", "tokens", "first ms", "p99", "between", "whole")
        lines = [f"{self.title}: {len(self.models)} models, fairness {self.fairness:.3f}, {self.failed} failed"]
        lines.append(f"{'model':<{width}}" + "".join(f"{name:>10}" for name in head))
        for name, each in [*self.models.items()][:MOST_ROWS]:
            times = (each.first_token_ms, each.first_token_p99_ms, each.between_tokens_ms, each.whole_ms)
            lines.append(
                f"{name:<{width}}{each.requests:>10}{each.tokens:>10}" + "".join(f"{ms:>10.1f}" for ms in times)
            )
        left = len(self.models) - MOST_ROWS
        return "\n".join([*lines, *([f"and {left} more"] if left > 0 else [])])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if value != value else value  # JSON has no NaN


def by_model(report: Mapping[str, Any]) -> tuple[Found, ...]:
    """Of guidellm's report, as its JSON has it; one for each of its benchmarks."""
    return tuple(_found(benchmark) for benchmark in report["benchmarks"])


def _found(benchmark: Mapping[str, Any]) -> Found:
    answered = [each for each in benchmark["requests"]["successful"] or [] if each["request_args"]]
    names = [json.loads(each["request_args"])["body"]["model"] for each in answered]
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name, _ in Counter(names).most_common()}
    for name, each in zip(names, answered, strict=True):
        groups[name].append(each)
    strategy = benchmark["config"]["strategy"]
    amount = next((strategy[field] for field in ("rate", "streams", "max_concurrency") if strategy.get(field)), "")
    means = [mean for group in groups.values() if (mean := _mean(_values(group, "time_to_first_token_ms"))) > 0]
    failed = len(benchmark["requests"]["errored"] or [])
    return Found(
        f"{strategy['type_']} {amount}".strip(),
        {name: _fared(group) for name, group in groups.items()},
        fairness(means),
        failed,
    )


def _fared(group: Sequence[Mapping[str, Any]]) -> Fared:
    first = _values(group, "time_to_first_token_ms")
    return Fared(
        len(group),
        sum(each["output_tokens"] or 0 for each in group),
        percentile(first, 50),
        percentile(first, 99),
        percentile(_values(group, "inter_token_latency_ms"), 50),
        1000 * percentile(_values(group, "request_latency"), 50),
    )


def _values(group: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    return sorted(each[field] for each in group if each[field] is not None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed; NaN where there are none."""
    return ordered[max(1, -(-len(ordered) * percent // 100)) - 1] if ordered else float("nan")


def fairness(values: Sequence[float]) -> float:
    """Jain's index: (sum x)^2 / (n sum x^2); NaN of nothing."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values)) if values else float("nan")
