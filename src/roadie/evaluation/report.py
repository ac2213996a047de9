"""Results of many adapters side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A head, and a row for each adapter: every metric of every task. Filters are named where they are not lm-eval's "none"."""
    columns: dict[tuple[str, str], None] = {}
    for found in results.values():
        for task, values in found["results"].items():
            columns.update(dict.fromkeys((task, metric) for metric in values if _is_metric(metric, values)))
    head = ["adapter", *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns)]
    rows = [
        [name, *(_shown(found["results"].get(task, {}).get(metric)) for task, metric in columns)]
        for name, found in results.items()
    ]
    return head, rows


def _is_metric(name: str, values: Mapping[str, Any]) -> bool:
    return name not in NOT_METRICS and "_stderr," not in name and isinstance(values[name], (int, float))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
