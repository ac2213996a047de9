"""Learning by reward: what a reply earns, the order of the runs, a run of GRPO, and the part of docs/quality.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.quality import records, reward, reward_report, sums
from benchmarks.quality.methods import METHODS, rate

from roadie import embedded
from roadie.errors import ConfigError

SMALL = reward.Size(steps=2, prompts=2, replies=2, tokens=2, samples=1)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("reply", "earned"),
    [(" 8", 1.0), ("8\n9", 0.75), (" 8 is", 0.5), (" 9", 0.5), (" 9\n", 0.25), ("nine", 0.0), ("", 0.0), (" 80", 0.5)],
)
def test_a_reply_earns_by_its_number_and_its_form(reply: str, earned: float) -> None:
    assert sums.reward(reply, 8) == earned
    assert reward.rewards(completions=[reply, ""], result=[8, 8], prompts=["", ""]) == [earned, 0.0]


def test_no_sum_is_in_two_parts_nor_among_the_examples() -> None:
    parts = sums.parts()
    every = [*parts.train, *parts.validation, *parts.test]
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [79, 18, 36]
    assert len({*every, *sums.EXAMPLES}) == len(every) + 2
    assert all(eval(one.asked.removesuffix("=")) == one.result >= 0 for one in every)
    assert sums.Sum(7, "*", 4).prompt == "6 + 2 = 8\n9 - 2 = 7\n7 * 4 ="


def record(method: str, exponent: int, seed: int, earned: float) -> dict[str, Any]:
    scores = {"loss": 1 - earned, "reward": earned}
    return {"method": method, "learning_rate": rate(exponent), "seed": seed, "validation": scores}


def test_searches_go_in_turn_and_come_before_other_seeds() -> None:
    found: list[dict[str, Any]] = []
    order = []
    while (following := reward.next_of(found)) is not None:
        order.append(following)
        name, exponent, seed = following
        found.append(record(name, exponent, seed, 0.5 - 0.1 * abs(exponent + 5)))
    assert order[:4] == [("road_1", -5, 0), ("lora_r1", -6, 0), ("lora_r8", -7, 0), ("road_1", -6, 0)]
    searches = sum(seed == 0 for _, _, seed in order)
    assert all(seed == 0 for _, _, seed in order[:searches])
    assert sorted(order[searches:]) == sorted((name, -5, seed) for name in reward.FIRST_RATES for seed in (1, 2))


@pytest.mark.usefixtures("precision")
def test_runs_are_kept_and_not_repeated(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    answers = iter([False, False, True])
    assert reward.sweep(embedded.model_path(), tmp_path, "cpu", lambda: next(answers), SMALL) == 2
    (path,) = tmp_path.glob("*.jsonl")
    base, *runs = records.read(path)
    assert [(one["method"], one["learning_rate"]) for one in runs] == [("road_1", 0.0032), ("lora_r1", 0.001)]
    for one in runs:
        assert len(one["curve"]) == SMALL.steps
        assert all(0 <= earned <= 1 for earned in one["curve"])
        assert one["before"] == base["test"]
        assert 0 < one["generation_s"] < one["processor_s"]
        assert one["test"]["loss"] == pytest.approx(1 - one["test"]["reward"])
    assert runs[0]["parameters"] < runs[1]["parameters"]
    assert str(embedded.model_path().parent) not in path.read_text(encoding="utf-8")
    assert reward.sweep(embedded.model_path(), tmp_path, "cpu", lambda: True, SMALL) == 0
    assert len(records.read(path)) == 3
    with pytest.raises(ConfigError, match="give another folder"):
        reward.sweep(embedded.model_path(), tmp_path, "cpu", lambda: True)
    with pytest.raises(ConfigError, match="got no model"):
        reward.sweep(tmp_path / "nothing", tmp_path, "cpu", lambda: True, SMALL)


@pytest.mark.usefixtures("precision")
def test_the_reward_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earns becomes likelier: here replies without any digit."""
    pytest.importorskip("trl")
    learner = reward.learner_of(embedded.model_path(), "cpu", reward.Size(12, 2, 8, tokens=3, samples=4))

    def without(completions: list[str], **columns: Any) -> list[float]:
        return [float(not any(letter.isdigit() for letter in reply)) for reply in completions]

    monkeypatch.setattr(reward, "rewards", without)
    curve = reward.run(learner, METHODS["road_1"], 0.1, seed=0)["curve"]
    assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.3


def runs_of(method: str, earned: list[float], exponent: int = -4, parameters: int = 1000) -> list[dict[str, Any]]:
    """A search around an exponent that has ended, and seeds at that rate."""
    whole = {
        "task": "reward.Model",
        "parameters": parameters,
        "stored_bytes": 4 * parameters,
        "processor_s": 300.0,
        "generation_s": 90.0,
        "peak_bytes": 5,
        "curve": [0.25, 0.5, 0.75],
    }

    def run(at: int, seed: int, validation: float, test: float) -> dict[str, Any]:
        scores = {"loss": 1 - test, "reward": test, "right": 0.875, "line": 0.5, "alone": 0.25}
        return {**whole, **record(method, at, seed, validation), "test": scores}

    sides = [run(at, 0, 0.1, 0.111) for at in (exponent - 1, exponent + 1)]
    return [*sides, *(run(exponent, seed, 0.9, one) for seed, one in enumerate(earned))]


def test_the_section_shows_finished_methods_and_who_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = {"reward": 0.625, "right": 0.7, "line": 0.6, "alone": 0.05}
    base = {**record("base", 0, 0, 0.5), "test": scores, "facts": {"size": vars(reward.Size())}}
    found = [base, *runs_of("road_1", [0.8, 0.9, 1.0]), *runs_of("lora_r1", [0.75, 0.85, 0.95], parameters=2000)]
    monkeypatch.setattr(reward_report, "committed", lambda: {"Model": [*found, *runs_of("lora_r8", [0.9, 0.9])]})
    monkeypatch.setattr(reward_report, "IMAGE", tmp_path / "images" / "reward.png")
    reward_report.IMAGE.parent.mkdir()
    shown = "\n".join(reward_report.text())
    assert "| no adapter | -          | -           | -    | 0.625" in shown
    assert "0.900 ± 0.100" in shown
    assert "0.111" not in shown  # a rate that was not chosen
    assert "road_1 less lora_r1, seed by seed: +0.050 ± 0.000 of the reward (win), with 0.50 times" in " ".join(
        shown.split()
    )
    assert "Not finished, so without figures: lora_r8." in shown
    reward_report.draw()
    assert reward_report.IMAGE.stat().st_size > 1000
    monkeypatch.setattr(reward_report, "committed", lambda: {"Model": [base]})
    assert not list(reward_report.text())


def test_a_curve_is_smoothed_by_what_came_before() -> None:
    assert reward_report.smoothed([0.0, 1.0, 0.5, 0.5], window=2) == [0.0, 0.5, 0.75, 0.5]
