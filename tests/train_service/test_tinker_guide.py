"""The guide's program and the example, with the SDK alone, against a server of the embedded model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from tests.guides import DOCS, blocks_of, run
from tests.serving.http.harness import Running
from tests.train_service.tinker_server import ALICE

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_service" / "tinker_lipogram.py"


@pytest.fixture
def told(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", ALICE)


def test_the_program_of_the_guide(told: None, tmp_path: Path) -> None:
    printed = run(blocks_of("train-service.md"), tmp_path).splitlines()
    losses = [float(line.removeprefix("loss ")) for line in printed[:8]]
    assert losses[-1] < 0.3 * losses[0]
    assert printed[8].startswith(" better than")
    assert printed[9].endswith("/weights/zen")


@pytest.mark.slow
def test_the_program_of_the_tutorial(told: None, tmp_path: Path) -> None:
    printed = run(blocks_of("tutorials/training-service.md"), tmp_path).splitlines()
    assert [line.split()[:2] for line in printed[:6]] == [["step", str(step)] for step in range(6)]
    assert printed[6].endswith("/weights/no-e")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_an_adapter_learns_from_a_reward_that_is_checked(
    told: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("sys.argv", ["example", str(seed)])
    rewards: Any = runpy.run_path(str(EXAMPLE), run_name="__main__")["REWARDS"]
    assert rewards[0] < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_ranks_of_the_guide_are_those_of_the_code() -> None:
    from tinker.types import LoraConfig

    from roadie.train_service.tinker_api.presets import road_words

    table = re.findall(
        r"^\| (?:up to|\d+ to|above) (\d+)[^|]*\| `(road_\d)`", (DOCS / "train-service.md").read_text(), re.MULTILINE
    )
    assert [road_words(LoraConfig(rank=int(rank)), {})["variant"] for rank, _ in table] == [
        variant for _, variant in table
    ]
    assert len(table) == 3
