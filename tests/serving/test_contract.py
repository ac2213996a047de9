"""What the engine holds of transformers is there, and where it is not, the error names it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.families.models import FAMILIES
from transformers.generation.continuous_batching import cache, continuous_api, model_runner, scheduler

from roadie.errors import ServingError
from roadie.serving import ContinuousBatchingEngine, EngineSettings, Registry, continuous_batching


def test_this_transformers_keeps_the_contract() -> None:
    assert continuous_batching.contract_problems() == []
    continuous_batching.check_contract()


def test_what_is_gone_or_takes_other_parameters_is_named(monkeypatch: Any) -> None:
    monkeypatch.delattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor")
    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "_generation_loop_body", lambda self, processor: None)
    monkeypatch.delattr(cache.PagedAttentionCache, "search_prefix_match")
    for name in ("compute_free_capacity", "get_num_free_blocks"):
        monkeypatch.delattr(cache.PagedAttentionCache, name, raising=False)
    with pytest.raises(ServingError) as refused:
        continuous_batching.check_contract()
    for part in (
        "ContinuousBatchingManager._create_batch_processor is not there",
        "_generation_loop_body takes (self, processor)",
        "search_prefix_match is not there",
    ):
        assert part in str(refused.value)
    assert re.search("(compute_free_capacity|get_num_free_blocks) is not there", str(refused.value))


def test_few_private_names_are_held_and_all_of_them_are_in_the_contract() -> None:
    of_blocks = max(continuous_batching.CONTRACT_OF_BLOCKS, key=len)
    assert len(continuous_batching.CONTRACT) + len(of_blocks) <= 8
    source = Path(continuous_batching.__file__).read_text()
    called = set(re.findall(r"_(?:manager|processor|cache|scheduler)\.(_\w+)", source))
    held = {name.rpartition(".")[2] for _, name, _ in (*continuous_batching.CONTRACT, *of_blocks)}
    assert called == {name for name in held if name.startswith("_")}


def test_blocks_that_were_looked_up_without_their_salt_are_refused() -> None:
    def careless(request_id: str, prompt_ids: list[int]) -> int:
        return len(hash_of(list(prompt_ids)))

    def hash_of(tokens: list[int]) -> list[int]:
        return tokens[0:8]

    kept = SimpleNamespace(search_prefix_match=careless)
    request = continuous_batching._Request("r", continuous_batching.Packed(0, 7))
    continuous_batching.salt_prefixes(kept, {"0": request}, 8)
    with pytest.raises(ServingError, match="without their salt"):
        kept.search_prefix_match("0", list(range(20)))


def test_versions_that_were_not_tested_are_refused_unless_allowed(monkeypatch: Any, model: Any, tmp_path: Path) -> None:
    for unknown in ("5.24.1", "5.16.0", "6.0.0.dev0"):
        monkeypatch.setattr(continuous_batching.transformers, "__version__", unknown)
        with pytest.raises(ServingError, match=rf"{re.escape(unknown)}.*not tested; wanted 5\.17 to 5\.23"):
            ContinuousBatchingEngine(model, None, Registry.open(tmp_path))
        ContinuousBatchingEngine(model, None, Registry.open(tmp_path), EngineSettings(allow_unknown_version=True))
    for known in ("5.17.0", "5.20.1", "5.23.0.dev0"):
        monkeypatch.setattr(continuous_batching.transformers, "__version__", known)
        continuous_batching.check_contract()


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


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("qwen3_next", "Qwen3NextForCausalLM with layers of linear_attention"),
        ("llama4_text", "Llama4ForCausalLM with layers of chunked_attention"),
        ("deepseek_v3", "DeepseekV3ForCausalLM whose latent attention has keys of"),
    ],
)
def test_models_whose_tokens_keep_something_else_are_refused_at_the_start(kind: str, said: str, tmp_path: Path) -> None:
    model = next(each for each in FAMILIES if each.kind == kind).model().float()
    before = model.config._attn_implementation
    engine = ContinuousBatchingEngine(model, None, Registry.open(tmp_path))
    with pytest.raises(ServingError, match=f"got a {said}.*AdapterBank and generate take this model"):
        engine.start()
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())
