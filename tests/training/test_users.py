"""What PEFT users do on their own: Trainer, the best checkpoint, the hub, quantised bases, no network."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from tests.versions import needs_uploads_by_an_api_object
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import roadie

CONFIG = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "group_size": 16}


TURTLES = [f"{n:02d} is a number of turtles" for n in range(16)]


def examples(tiny, texts):
    return [{"input_ids": row} for row in tiny.tokenizer()(texts)["input_ids"]]


def trainer_for(model, tiny, folder, evaluation=None, **arguments):
    settings = {"max_steps": 6, "learning_rate": 3e-2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=examples(tiny, TURTLES),
        eval_dataset=evaluation,
        data_collator=DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def states_of(model):
    """The base's tensors and the adapter's, each a copy."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    adapter = {name: tensor for name, tensor in state.items() if ".road_" in name}
    return {name: tensor for name, tensor in state.items() if name not in adapter}, adapter


def test_trainer_trains_the_adapter_and_nothing_else(tiny, tmp_path):
    model = roadie.get_peft_model(tiny.model(), roadie.RoadConfig(**CONFIG))
    base, adapter = states_of(model)
    trainer = trainer_for(model, tiny, tmp_path)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    base_after, adapter_after = states_of(model)
    assert all(torch.equal(base[name], base_after[name]) for name in base)
    assert not any(torch.equal(adapter[name], adapter_after[name]) for name in adapter)


def test_trainer_resumes_from_its_checkpoint(tiny, tmp_path):
    def trainer(folder, **arguments):
        model = roadie.get_peft_model(tiny.model(), roadie.RoadConfig(**CONFIG))
        return trainer_for(model, tiny, tmp_path / folder, save_steps=4, **arguments)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    expected, found = states_of(whole.model)[1], states_of(resumed.model)[1]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_load_best_model_at_end(tiny, tmp_path):
    model = roadie.get_peft_model(tiny.model(), roadie.RoadConfig(**CONFIG))
    every_second = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    arguments = {"max_steps": 12, "learning_rate": 0.3, "lr_scheduler_type": "constant", **every_second}
    other = examples(tiny, ["the lazy fox" * 10])
    trainer = trainer_for(model, tiny, tmp_path, other, load_best_model_at_end=True, **arguments)
    trainer.train()
    seen = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == min(seen, key=seen.get) < 12
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen.values()), rel=1e-6)


@pytest.fixture
def for_the_hub(tiny):
    model = tiny.model()
    model.name_or_path = model.config._name_or_path = "owner/base"  # as from_pretrained does
    return roadie.get_peft_model(model, roadie.RoadConfig(**CONFIG))


def test_the_model_card_says_what_it_is_an_adapter_of(for_the_hub, tmp_path):
    for_the_hub.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "owner/base")
    assert card.data.pipeline_tag == "text-generation"
    assert "base_model:adapter:owner/base" in card.data.tags
    assert "PEFT 0." in card.text


@needs_uploads_by_an_api_object
def test_push_to_hub_uploads_the_adapter_and_a_card(for_the_hub, tmp_path, monkeypatch):
    uploaded = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        assert repo_id == "owner/adapter"
        for operation in operations:  # the files are temporary, so they are read now
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for_the_hub.push_to_hub("owner/adapter")
    for_the_hub.save_pretrained(str(tmp_path))
    # Of the card only the existence: for a new repository transformers puts a card of its own in the place of PEFT's.
    assert ModelCard(uploaded.pop("README.md").decode()).data.tags is not None
    assert uploaded == {
        name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_prepare_model_for_kbit_training(tiny, tiny_path, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training

    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    )
    model = roadie.get_peft_model(prepare_model_for_kbit_training(quantised), roadie.RoadConfig(**CONFIG))
    before = {name: copy.deepcopy(p.data) for name, p in model.named_parameters() if "base_layer" in name}
    trainer = trainer_for(model, tiny, tmp_path)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    assert before
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name].data, data) for name, data in before.items())
    assert {p.dtype for name, p in model.named_parameters() if ".road_" in name} == {torch.float32}


def test_everything_works_without_a_network(adapters, texts, tiny_path, tmp_path, monkeypatch):
    from roadie.training.generation import Decoding, continue_prompts
    from roadie.training.merging import merge_to_disk
    from roadie.training.prompts import Prompt
    from roadie.training.recipe import Recipe
    from roadie.training.run import train

    def no_network(*_, **__):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(AssertionError, match="the network"):
        socket.create_connection(("192.0.2.1", 80))
    result = train(
        texts, tmp_path / "adapter", model=str(tiny_path), recipe=Recipe(max_steps=1, batch_size=8, group_size=16)
    )
    (text,) = continue_prompts([Prompt("a", "mine")], [f"mine={result.output}"], decoding=Decoding(4))
    assert isinstance(text, str)
    assert (merge_to_disk([str(Path(result.output))], tmp_path / "merged").output / "config.json").exists()
