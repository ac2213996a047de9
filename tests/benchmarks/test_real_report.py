"""The part of docs/quality.md on real models shows finished rows alone, and its verdicts are those of the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.harness import Budget
from benchmarks.quality import quick, real_report, report, tenants
from benchmarks.quality.methods import METHODS
from benchmarks.statistics import wilson

from roadie import embedded

MODEL = "Model-from-Q4_1"
STEPS = {
    name: {"median_ms": ms, "over_base": {"value": ms / 100}} for name, ms in {"base": 100.0, "road": 110.0}.items()
}


def run(
    method: str, rate: float, seed: int, validation: float, test: float | None, parameters: int = 1000
) -> dict[str, Any]:
    return {
        "task": f"mawps.{MODEL}",
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "steps": 50,
        "parameters": parameters,
        "stored_bytes": 4 * parameters,
        "processor_s": 3600.0,
        "peak_bytes": 5,
        "commit": "0123456789",
        "validation": {"loss": validation, "cost": validation},
        "test": None if test is None else {"loss": test, "exact_match": 0.25},
    }


def searched(method: str, tests: list[float], parameters: int = 1000) -> list[dict[str, Any]]:
    """A search around 1e-2 that has ended, and seeds at that rate."""
    sides = [run(method, rate, 0, 2.0, None, parameters) for rate in (0.0032, 0.032)]
    return [*sides, *(run(method, 0.01, seed, 1.0, test, parameters) for seed, test in enumerate(tests))]


def recorded(*found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    base = {"method": "base", "facts": {"rows": {"tests.test": 100}}, "test": {"loss": 3.0, "exact_match": 0.0}}
    return {f"mawps.{MODEL}": [base, *(record for records in found for record in records)]}


def text_of(monkeypatch: pytest.MonkeyPatch, everything: dict[str, list[dict[str, Any]]]) -> str:
    monkeypatch.setattr(real_report, "committed", lambda: everything)
    return "\n".join(real_report.text())


def test_rows_are_shown_when_search_and_seeds_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = searched("road_4", [1.0, 1.1, 1.2])[1:]  # no rate below the best has been tried
    two_seeds = searched("lora_r8", [1.0, 1.1])
    once = searched("oft_4", [0.7654])
    shown = text_of(monkeypatch, recorded(searched("road_1", [1.0, 1.1, 1.2]), going_on, two_seeds, once))
    assert "1.1000 ± 0.1000" in shown
    assert "0.7654" in shown
    table, _, lacking = shown.partition("Not finished, so without figures: mawps: ")
    assert "| road_4" not in table
    assert "| lora_r8" not in table
    assert "road_4" in lacking
    assert "lora_r8" in lacking
    assert "road_1," not in lacking
    assert "25.0 [17.5, 34.3]" in shown


def test_a_picture_is_shown_where_there_are_rows_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = searched("road_1", [1.0, 1.1, 1.2]), searched("lora_r1", [1.0, 1.1, 1.2])
    assert real_report.IMAGE.name not in text_of(monkeypatch, recorded(one))
    assert real_report.IMAGE.name in text_of(monkeypatch, recorded(one, other))


def test_nothing_is_said_without_records(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_of(monkeypatch, {}) == ""
    assert "Not finished" in text_of(monkeypatch, recorded(searched("road_1", [1.0])))


def test_a_step_of_decoding_is_compared_with_loras_that_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = recorded(searched("road_1", [1.0, 1.1, 1.2]), searched("lora_r1", [2.0, 2.1, 2.2], 2000))
    results = real_report.finished_of(f"mawps.{MODEL}", everything[f"mawps.{MODEL}"])
    for cost, verdicts, words in (
        (112.0, ["win"], "1 won, 0 tied, 0 lost"),
        (113.0, [], "costs more than any of ours"),
    ):
        steps = {**STEPS, "lora_r1": {"median_ms": cost, "over_base": {"value": cost / 100}}}
        assert [one.verdict for one in real_report.at_equal_step(results, steps)] == verdicts
        kept = {f"tenants.{MODEL}": [{"steps": steps}]}
        assert words in " ".join(text_of(monkeypatch, {**everything, **kept}).split())


def test_the_rule_for_the_rate_stands_beside_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, by_rule = searched("road_1", [1.0, 1.1, 1.2]), run("road_1", 0.008, 0, 1.0123, None)
    shown = text_of(monkeypatch, recorded([*whole, by_rule]))
    (row,) = [line for line in shown.splitlines() if "0.008" in line]
    assert [cell.strip() for cell in row.split("|")][1:-1] == [
        *("mawps", "road_1", "0.008", "1.0123", "0.01", "1.0000", "+0.0123")
    ]
    stopped = {**by_rule, "validation": None}
    assert "0.008" not in text_of(monkeypatch, recorded([*whole, stopped]))


def test_what_is_planned_can_be_served_or_says_that_it_cannot() -> None:
    names = {name for task in real_report.read(real_report.GRID) for name in real_report.planned(task)}
    assert names - set(tenants.SERVED_AS) == {"ia3", "dora_r1", "vera_r256", "oft_4"}
    assert names <= set(METHODS)


def test_intervals_are_wilsons() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_steps_with_many_tenants_are_measured_beside_the_base() -> None:
    base = embedded.load_model().requires_grad_(False).eval()
    with torch.random.fork_rng():
        found = tenants.of_model(base, Budget(0.0, 1, 1, warm_up_calls=1, shortest_sample_s=0, processor_time=True))
    assert set(found["steps"]) == {"base", *tenants.SERVED_AS.values()}
    assert all(one["median_ms"] > 0 for one in found["steps"].values())
    assert found["steps"]["base"]["over_base"]["value"] == 1.0


def test_a_row_that_is_repeated_has_to_be_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(quick.models, "fetched", lambda name: tmp_path)
    monkeypatch.setattr(real_report, "committed", dict)
    assert quick.repeat_real() == 2
    assert report.DOCUMENT.read_text(encoding="utf-8").count("# How well adapters learn") == 1
