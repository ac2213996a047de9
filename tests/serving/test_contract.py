"""What the engine holds of transformers is there, and where it is not, the error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.generation.continuous_batching import cache, model_runner, scheduler

from roadie.errors import ServingError
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry, continuous_batching


def test_this_transformers_keeps_the_contract() -> None:
    assert continuous_batching.contract_problems() == []
    continuous_batching.check_contract()


def test_what_is_gone_or_takes_other_parameters_is_named(monkeypatch: Any) -> None:
    monkeypatch.delattr(model_runner.ModelRunner, "_sample")
    monkeypatch.setattr(scheduler.Scheduler, "finish_request", lambda self, request_id, reason: None)
    monkeypatch.delattr(cache.PagedAttentionCache, "search_prefix_match")
    with pytest.raises(ServingError) as refused:
        continuous_batching.check_contract()
    for part in (
        "ModelRunner._sample is not there",
        "finish_request takes (self, request_id, reason)",
        "search_prefix_match",
    ):
        assert part in str(refused.value)


def test_versions_that_were_not_tested_are_refused_unless_allowed(monkeypatch: Any, model: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.24.1")
    with pytest.raises(ServingError, match=r"5\.24\.1.*not tested"):
        ContinuousBatchingEngine(model, None, Registry.open(tmp_path))
    ContinuousBatchingEngine(model, None, Registry.open(tmp_path), EngineSettings(allow_unknown_version=True))


def test_only_one_module_touches_private_parts_of_transformers() -> None:
    folder = Path(continuous_batching.__file__).parent
    for file in folder.glob("*.py"):
        if file.name != "continuous_batching.py":
            assert "transformers.generation" not in file.read_text(), file.name


def test_nothing_of_transformers_is_changed_for_others(model: Any, tmp_path: Path) -> None:
    before = {
        owner: dict(vars(owner)) for owner in (model_runner.ModelRunner, cache.PagedAttentionCache, scheduler.Scheduler)
    }
    engine = ContinuousBatchingEngine(model, None, Registry.open(tmp_path))
    engine.start()
    try:
        assert all(dict(vars(owner)) == parts for owner, parts in before.items())
    finally:
        engine.stop()
