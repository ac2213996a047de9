"""The engine serves adapters of stacked experts, each and shared, beside plain ones: the texts are those of merged models.

Besides the experts that tokens are given to there are shared ones, linear layers that are given all tokens flat.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.serving.harness import prompt, save_all, serving
from tests.versions import needs_stacked_experts
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import roadie
from roadie.bank.live import live_adapter
from roadie.serving import EngineSettings, FinishReason
from roadie.testing.models import randomise

KINDS = ("each", "shared", None, "each", "shared", "each", "shared", None)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
SETTINGS = EngineSettings(num_slots=10, page_size=8, num_blocks=128)
pytestmark = [pytest.mark.filterwarnings("ignore:this adapter"), needs_stacked_experts]


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=16)).eval()


def qwen2_moe() -> Any:
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=16)).eval()


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def adapted(make: Callable[[], Any], targets: list[str], number: int) -> Any:
    variant = ("road_1", "road_2", "road_4")[number % 3]
    settings = {"variant": variant, "group_size": (4, 8)[number % 2], "target_experts": KINDS[number]}
    model = roadie.get_peft_model(seeded(make), roadie.RoadConfig(target_modules=targets, **settings))
    return randomise(model, seed=number, scale=0.3)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen3_moe, ["q_proj", "o_proj"]),
        (qwen2_moe, ["o_proj", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]),
    ],
    ids=["qwen3_moe", "qwen2_moe"],
)
def test_eight_adapters_are_served_at_once_and_say_what_merged_models_say(
    make: Callable[[], Any], targets: list[str], tmp_path: Path
) -> None:
    models = {f"a{number}": adapted(make, targets, number) for number in range(len(KINDS))}
    values = {name: live_adapter(model, "default") for name, model in models.items()}
    files = {
        name: roadie.Adapter(value.layers, models[name].peft_config["default"].to_dict())
        for name, value in values.items()
    }
    save_all(files, tmp_path)
    with serving(seeded(make), tmp_path, SETTINGS) as collector:
        asked = {}
        for place, name in enumerate([*models, *models, None]):
            prompt_ids = prompt(place, 5 + place)
            asked[collector.submit(prompt_ids, name, max_tokens=8)] = (prompt_ids, name)
        collector.wait()
    merged = {name: model.merge_and_unload() for name, model in models.items()}
    references = {name: GreedyReference(model, {}) for name, model in {**merged, None: seeded(make)}.items()}
    verdict = GreedyVerdict()
    for request_id, (prompt_ids, name) in asked.items():
        assert collector.last(request_id).finish is FinishReason.LENGTH, collector.last(request_id)
        verdict += references[name].check(prompt_ids, None, collector.tokens(request_id))
    assert (verdict.num_tokens, verdict.num_wrong) == (8 * len(asked), 0)
