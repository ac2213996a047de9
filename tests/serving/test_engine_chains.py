"""The engine serves adapters of several rotations in a row beside plain ones, each row its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.serving.harness import prompt, save_all, serving

from roadie.adapter import Adapter, LayerParameters
from roadie.serving import EngineSettings, FinishReason

SETTINGS = EngineSettings(num_slots=6, page_size=8, num_blocks=128)


def chain_like(adapter: Adapter, seed: int, stages: list[int]) -> Adapter:
    """An adapter of the same layers with these rotations in a row."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, layer in adapter.layers.items():
        size = len(stages) * layer.out_features // 2
        theta, alpha = (0.2 * torch.randn(size, generator=generator) for _ in range(2))
        layers[path] = LayerParameters(theta, 1 + alpha, "road_1", stages)
    return Adapter(layers, {"peft_type": "ROAD", "variant": "road_1", "stages": stages})


@pytest.mark.filterwarnings("ignore:this adapter has several rotations")
def test_chains_come_and_go_beside_plain_adapters(model: Any, adapters: Any, root: Path) -> None:
    plain = next(iter(adapters.values()))
    chains = {"deep": chain_like(plain, 1, [2, 8, 16]), "deeper": chain_like(plain, 2, [16, 4])}
    save_all(chains, root)
    everything = {**adapters, **chains}
    wishes: list[Any] = ["a0", None, "deep", {"deep": 0.5}, "deeper", "a1", {"deeper": -1.0}, "deep"]
    with serving(model, root, SETTINGS) as collector:
        asked = {}
        for place, wish in enumerate(wishes * 2):
            prompt_ids = prompt(place, 5 + 2 * place)
            asked[collector.submit(prompt_ids, wish, max_tokens=8)] = (prompt_ids, wish)
        collector.wait()
    reference, verdict = GreedyReference(model, everything), GreedyVerdict()
    for request_id, (prompt_ids, wish) in asked.items():
        assert collector.last(request_id).finish is FinishReason.LENGTH
        verdict += reference.check(prompt_ids, wish, collector.tokens(request_id))
    assert (verdict.num_tokens, verdict.num_wrong) == (8 * len(asked), 0)


@pytest.mark.filterwarnings("ignore:this adapter has several rotations")
def test_a_blend_of_stages_that_differ_fails_alone_and_says_why(model: Any, adapters: Any, root: Path) -> None:
    chain = chain_like(next(iter(adapters.values())), 1, [2, 8, 16])
    save_all({"deep": chain}, root)
    with serving(model, root, SETTINGS) as collector:
        good = collector.submit(prompt(1, 6), "deep")
        bad = collector.submit(prompt(1, 6), {"deep": 0.5, "a0": 0.5})
        collector.wait()
    assert collector.last(good).finish is FinishReason.LENGTH
    assert collector.last(bad).finish is FinishReason.FAILED
    assert "group sizes [16] and [2, 8, 16] in a row" in str(collector.last(bad).error)
