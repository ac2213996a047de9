"""What names stand for: adapters of a folder, and blends; needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from roadie import checkpoint
from roadie.errors import RoutingError
from roadie.vllm.resolver import path_of, weights_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which "found" and "odd=1" are."""
    for name in ("found", "odd=1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.CONFIG_NAME).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("legal=0.5", {"legal": 0.5}),
        ("base:legal=0.7+terse=0.3", {"legal": 0.7, "terse": 0.3}),
        ("org/model:legal=-1", {"legal": -1.0}),
        ("base:legal", {"legal": 1.0}),
        ("base:found", {"found": 1.0}),
        ("base:odd=1", {"odd=1": 1.0}),
        ("odd=1=0.5", {"odd=1": 0.5}),
    ],
)
def test_blends_and_strengths_are_asked_for_as_of_roadies_own_server(
    folder: Path, model: str, weights: dict[str, float]
) -> None:
    known = {"legal", "terse", "found", "odd=1"}
    path = path_of(model, ["org/model"], str(folder), known.__contains__)
    assert path is not None
    assert weights_in(path) == weights


def test_names_of_adapters_go_first_and_unknown_ones_are_nothing(folder: Path) -> None:
    for name in ("found", "odd=1"):
        assert path_of(name, ["org/model"], str(folder), lambda _: True) == str(folder / name)
    for name in ("nowhere", "base", "org/model", "base:nowhere", "found=1+nowhere=2", "other:found"):
        assert path_of(name, ["org/model"], str(folder), {"found"}.__contains__) is None
    assert path_of("found", ["org/model"], None, {"found"}.__contains__) is None
    assert weights_in(str(folder / "found")) == {}


@pytest.mark.parametrize("model", ["found=high", "found=0.5+", "found=1+found=2", "base:found=11", "=1"])
def test_what_is_no_blend_is_refused(folder: Path, model: str) -> None:
    with pytest.raises(RoutingError, match="wanted"):
        path_of(model, ["org/model"], str(folder), {"found"}.__contains__)


def test_a_path_of_a_blend_says_its_weights_exactly() -> None:
    weights = {"legal": 1 / 3, "terse": -1e-07, "odd=1": 2.0}
    assert weights_in("blend:" + "+".join(f"{name}={weight!r}" for name, weight in weights.items())) == weights
    with pytest.raises(RoutingError, match="wanted one from -10 to 10"):
        weights_in("blend:legal=11.0")
