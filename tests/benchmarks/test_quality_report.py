"""docs/quality.md is what the records say, and its verdicts are those of the figures."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.quality import quick, report


def run(method: str, seed: int, loss: float, parameters: int = 1000, learning_rate: float = 0.01) -> dict[str, Any]:
    score = {"loss": loss, "accuracy": 0.5}
    return {
        "task": "t",
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": parameters,
        "stored_bytes": 4 * parameters,
        "processor_s": 1.0,
        "peak_bytes": 5,
        "validation": score,
        "test": score,
    }


def runs(method: str, losses: list[float], parameters: int = 1000) -> list[dict[str, Any]]:
    return [run(method, seed, loss, parameters) for seed, loss in enumerate(losses)]


def test_the_document_is_what_the_records_say() -> None:
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.text_of(report.committed())
    for name in ("parameters", "bytes", "rates"):
        assert (report.IMAGES / f"quality-{name}.png").is_file()


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([1.0, 1.1, 1.2], "win"), ([3.0, 3.1, 3.2], "LOSS"), ([2.1, 1.9, 2.2], "tie")],
)
def test_a_difference_within_one_spread_is_a_tie(ours: list[float], verdict: str) -> None:
    results = report.results_of([*runs("road_2", ours), *runs("lora_r1", [2.0, 2.0, 2.1])])
    assert [one.verdict for one in report.comparisons(results)] == [verdict]


def test_only_methods_of_equal_size_with_all_seeds_are_compared() -> None:
    lora = runs("lora_r1", [2.0, 2.0, 2.1])
    assert report.comparisons(report.results_of([*runs("road_2", [1, 1, 1.1], 1200), *lora])) == []
    assert report.comparisons(report.results_of([*runs("road_2", [1, 1.1]), *lora])) == []
    twice = report.results_of([*runs("road_4", [1, 1, 1.1], 2000), *lora])  # served as half of its parameters
    assert report.comparisons(twice) == []
    assert len(report.comparisons(twice, "kept_bytes")) == 1


def test_the_rate_is_chosen_by_the_first_seeds_validation() -> None:
    better = run("road_2", 0, 1.5, learning_rate=0.032)
    (result,) = report.results_of([*runs("road_2", [2.0, 0.1, 0.1]), better])
    assert (result.rate, result.losses) == (0.032, (1.5,))


def test_a_repeated_row_has_to_have_the_recorded_loss() -> None:
    assert quick.agrees(run("road_2", 0, 2.0), 2.0 + quick.TOLERANCE / 2)
    assert not quick.agrees(run("road_2", 0, 2.0), 2.0 + 2 * quick.TOLERANCE)
