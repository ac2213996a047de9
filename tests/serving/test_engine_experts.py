"""The engine serves adapters of stacked experts, each and shared, beside plain ones: the texts are those of merged models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.harness import prompt, save_all, serving
from tests.versions import needs_stacked_experts
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import roadie
from roadie.bank.live import live_adapter
from roadie.serving import EngineSettings, FinishReason
from roadie.testing import GreedyReference, GreedyVerdict
from roadie.testing.models import randomise

KINDS = ("each", "shared", None, "each", "shared", "each", "shared", None)
SETTINGS = EngineSettings(num_slots=10, page_size=8, num_blocks=128)
pytestmark = [pytest.mark.filterwarnings("ignore:this adapter"), needs_stacked_experts]


def mixture() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    return Qwen3MoeForCausalLM(config).eval()


def adapted(number: int) -> Any:
    variant = ("road_1", "road_2", "road_4")[number % 3]
    settings = {"variant": variant, "group_size": (4, 8)[number % 2], "target_experts": KINDS[number]}
    model = roadie.get_peft_model(mixture(), roadie.RoadConfig(target_modules=["q_proj", "o_proj"], **settings))
    return randomise(model, seed=number, scale=0.3)


def test_eight_adapters_are_served_at_once_and_say_what_merged_models_say(tmp_path: Path) -> None:
    models = {f"a{number}": adapted(number) for number in range(len(KINDS))}
    values = {name: live_adapter(model, "default") for name, model in models.items()}
    files = {
        name: roadie.Adapter(value.layers, models[name].peft_config["default"].to_dict())
        for name, value in values.items()
    }
    save_all(files, tmp_path)
    with serving(mixture(), tmp_path, SETTINGS) as collector:
        asked = {}
        for place, name in enumerate([*models, *models, None]):
            prompt_ids = prompt(place, 5 + place)
            asked[collector.submit(prompt_ids, name, max_tokens=8)] = (prompt_ids, name)
        collector.wait()
    merged = {name: model.merge_and_unload() for name, model in models.items()}
    references = {name: GreedyReference(model, {}) for name, model in {**merged, None: mixture()}.items()}
    verdict = GreedyVerdict()
    for request_id, (prompt_ids, name) in asked.items():
        assert collector.last(request_id).finish is FinishReason.LENGTH, collector.last(request_id)
        verdict += references[name].check(prompt_ids, None, collector.tokens(request_id))
    assert (verdict.num_tokens, verdict.num_wrong) == (8 * len(asked), 0)
