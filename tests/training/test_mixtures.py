"""A mixture of experts all the way: trained by Trainer and by TRL, saved, loaded, served eight at a time, merged; one text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.greedy import GreedyReference, GreedyVerdict
from tests.serving.harness import serving
from tests.versions import needs_stacked_experts
from transformers import (
    DataCollatorForLanguageModeling,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import roadie
from roadie.serving import EngineSettings

KINDS = ("each", "shared", None, "each")
ANIMALS = ("turtles", "foxes", "hens", "bees")
TRAINING = {
    "max_steps": 4,
    "learning_rate": 0.1,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
}
NUM_NEW = 8

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:this adapter has"), needs_stacked_experts]


def mixture(tokenizer: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, vocab_size=len(tokenizer))).eval()


def config(number: int) -> roadie.RoadConfig:
    variant = ("road_1", "road_2", "road_4")[number % 3]
    settings = {"variant": variant, "group_size": 8, "target_experts": KINDS[number % 4]}
    return roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)


def texts(number: int) -> list[str]:
    return [f"{place:02d} is a number of {ANIMALS[number % 4]}" for place in range(8)]


def by_trainer(number: int, tokenizer: Any, folder: Path) -> Any:
    model = roadie.get_peft_model(mixture(tokenizer), config(number))
    rows = [{"input_ids": row} for row in tokenizer(texts(number))["input_ids"]]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, TrainingArguments(str(folder), **TRAINING), train_dataset=rows, data_collator=collator).train()
    return model


def by_trl(number: int, tokenizer: Any, folder: Path) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trainer = trl.SFTTrainer(
        mixture(tokenizer),
        trl.SFTConfig(str(folder), **TRAINING),
        train_dataset=datasets.Dataset.from_dict({"text": texts(number)}),
        processing_class=tokenizer,
        peft_config=config(number),
    )
    trainer.train()
    return trainer.model


def continued(model: Any, prompt_ids: list[int]) -> list[int]:
    made = model.eval().generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None)
    tokens: list[int] = made[0, len(prompt_ids) :].tolist()
    return tokens


def test_eight_adapters_say_the_same_trained_loaded_served_at_once_and_merged(tiny: Any, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    ways: tuple[Callable[..., Any], ...] = (by_trainer, by_trl)
    models = {f"a{number}": ways[number // 4](number, tokenizer, tmp_path / "runs") for number in range(8)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "adapters" / name)
    prompts = {name: tokenizer(f"0{number} is a ")["input_ids"] for number, name in enumerate(models)}
    with serving(
        mixture(tokenizer), tmp_path / "adapters", EngineSettings(num_slots=8, page_size=8, num_blocks=64)
    ) as server:
        asked = {name: server.submit(ids, name, max_tokens=NUM_NEW) for name, ids in prompts.items()}
        server.wait()
    verdict = GreedyVerdict()
    for name, ids in prompts.items():
        loaded = roadie.PeftModel.from_pretrained(mixture(tokenizer), tmp_path / "adapters" / name)
        said = [continued(models[name], ids), continued(loaded, ids), server.tokens(asked[name])]
        assert said[0] != continued(mixture(tokenizer), ids), name  # the adapter means something
        merged = GreedyReference(loaded.merge_and_unload(), {})
        for tokens in said:
            assert len(tokens) == NUM_NEW, name
            verdict += merged.check(ids, None, tokens)
    assert (verdict.num_tokens, verdict.num_wrong) == (8 * 3 * NUM_NEW, 0)
