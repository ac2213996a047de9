"""Names of adapters that are parts of module paths: refused where saving would lose a tensor, and only there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

import roadie
from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.testing import random_adapter, randomise, stock_peft, tiny_llama
from roadie.training.many import train_many

SETTINGS = {"target_modules": ["q_proj", "gate_proj"], "group_size": 16}
IDS = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))
PARTS = sorted({part for path, _ in tiny_llama().named_modules() for part in path.split(".")} - {"", "model"})


def two(first: str, second: str, second_settings=None):
    """A model with two adapters, in this order, each of values of its own."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**SETTINGS), adapter_name=first)
    model.add_adapter(second, roadie.RoadConfig(**(second_settings or SETTINGS)))
    return randomise(model).eval()


def stock_loses(first: str, second: str, folder: Path) -> bool:
    """Whether stock PEFT, with adapters of these names, writes fewer tensors than there are."""
    with stock_peft() as config:
        import peft

        model = peft.get_peft_model(tiny_llama(), config(**SETTINGS), adapter_name=first)
        model.add_adapter(second, config(**SETTINGS))
        model.save_pretrained(str(folder))
    return any(len(load_file(folder / name / checkpoint.WEIGHTS_NAME)) < 8 for name in (first, second))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PARTS, "mlps", "base_model", "proj"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_name_is_refused_just_where_peft_would_lose_tensors(name, is_first, tmp_path, portrait):
    order = (name, "good") if is_first else ("good", name)
    loses = stock_loses(*order, tmp_path / "stock")
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**SETTINGS), adapter_name=order[0])
    before = portrait(model)
    if loses:
        with pytest.raises(ConfigError, match=rf"{name!r}, which is a part of the module path .*wanted .*'my_{name}'"):
            model.add_adapter(order[1], roadie.RoadConfig(**SETTINGS))
        assert portrait(model) == before
        return
    model = two(*order)
    model.save_pretrained(str(tmp_path / "ours"))
    for adapter in order:
        assert len(load_file(tmp_path / "ours" / adapter / checkpoint.WEIGHTS_NAME)) == 8
        model.set_adapter(adapter)
        again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours" / adapter), adapter_name=adapter).eval()
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_some_of_these_names_are_refused_and_some_are_not(tmp_path):
    lossy = {name: stock_loses("good", name, tmp_path / name) for name in ("mlp", "0", "gate_proj", "lm_head", "norm")}
    assert lossy == {"mlp": True, "0": True, "gate_proj": True, "lm_head": False, "norm": False}


def test_what_counts_is_where_the_adapters_have_tensors(tmp_path):
    """With q_proj alone nothing lies below mlp; the adapter that would change that is refused, and says what to do."""
    attention = {**SETTINGS, "target_modules": ["q_proj"]}
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**attention), adapter_name="mlp")
    model.add_adapter("good", roadie.RoadConfig(**attention))
    with pytest.raises(ConfigError, match="save 'mlp', delete it and load it again under another name"):
        model.add_adapter("late", roadie.RoadConfig(**SETTINGS))
    model.save_pretrained(str(tmp_path))
    assert len(load_file(tmp_path / "good" / checkpoint.WEIGHTS_NAME)) == 4


def test_an_adapter_that_is_alone_may_have_any_name(tmp_path):
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**SETTINGS), adapter_name="mlp")
    randomise(model).eval().save_pretrained(str(tmp_path))
    assert len(load_file(tmp_path / "mlp" / checkpoint.WEIGHTS_NAME)) == 8
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "mlp"), adapter_name="layers").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("door", ["load_adapter", "weighted", "transformers"])
def test_every_door_refuses_and_changes_nothing(door, tmp_path, portrait):
    if door == "transformers":
        model = tiny_llama()
        model.add_adapter(roadie.RoadConfig(**SETTINGS), "good")
    else:
        model = two("good", "other")
        model.save_pretrained(str(tmp_path))
    doors = {
        "load_adapter": lambda: model.load_adapter(str(tmp_path / "good"), adapter_name="mlp"),
        "weighted": lambda: model.add_weighted_adapter(["good", "other"], [1, 1], "mlp"),
        "transformers": lambda: model.add_adapter(roadie.RoadConfig(**SETTINGS), "mlp"),
    }
    before = portrait(model)
    with pytest.raises(
        ConfigError, match=r"'mlp', which is a part of the module path model\.layers\.0\.mlp\.gate_proj"
    ):
        doors[door]()
    assert portrait(model) == before


def test_a_first_adapter_that_transformers_cannot_add_leaves_the_name_free(portrait):
    model = tiny_llama()
    before = portrait(model)
    with pytest.raises(ConfigError, match="reserved"):
        model.add_adapter(roadie.RoadConfig(**SETTINGS), "weight")
    assert portrait(model) == before
    model.add_adapter(roadie.RoadConfig(**SETTINGS), "weigh")


def _classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("score", {"modules_to_save": ["score"]}), ("input_layernorm", {"modules_to_save": ["input_layernorm"]})],
)
def test_an_adapter_is_not_called_like_a_module_that_it_trains_whole(name, settings):
    """PEFT would take the name off ``score.weight``, and find nothing of that name when it loads the file."""
    model = _classifier()
    with pytest.raises(ConfigError, match=f"{name!r}, which is a part of the module path .*{name}"):
        roadie.get_peft_model(model, roadie.RoadConfig(**SETTINGS, **settings), adapter_name=name)
    assert not any(hasattr(module, "road_theta") for module in model.modules())
    roadie.get_peft_model(model, roadie.RoadConfig(**SETTINGS, **settings), adapter_name="dense")


def test_a_name_below_which_another_trains_modules_whole_or_biases_is_refused():
    whole = roadie.get_peft_model(_classifier(), roadie.RoadConfig(**SETTINGS, modules_to_save=["score"]))
    with pytest.raises(ConfigError, match="'score', which is a part of the module path score"):
        whole.add_adapter("score", roadie.RoadConfig(**{**SETTINGS, "target_modules": ["q_proj"]}))
    model = tiny_llama(attention_bias=True)
    biases = roadie.get_peft_model(
        model, roadie.RoadConfig(target_modules=["gate_proj"], group_size=16, bias="all"), adapter_name="good"
    )
    with pytest.raises(ConfigError, match=r"'k_proj', which is a part of the module path .*k_proj\.bias"):
        biases.add_adapter("k_proj", roadie.RoadConfig(**SETTINGS))


def test_what_was_made_trainable_stays_so_whatever_the_new_adapter_is_called():
    """PEFT passes over parameters that have the name of the new adapter in theirs."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(target_modules=["q_proj"], group_size=16))
    down = model.get_base_model().model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    model.add_adapter("mlp", roadie.RoadConfig(target_modules=["q_proj"], group_size=16))
    assert down.requires_grad


def test_banks_and_many_jobs_take_such_names_and_lose_nothing(tmp_path):
    model = tiny_llama()
    adapter = random_adapter(model, 1)
    alone = roadie.AdapterBank(tiny_llama(), slots=2)
    alone.admit("good", adapter)
    bank = roadie.AdapterBank(model, slots=2)
    bank.admit("mlp", adapter)
    bank.admit("layers", random_adapter(model, 2))
    with torch.no_grad(), bank.rows(["mlp", "mlp"]), alone.rows(["good", "good"]):
        assert torch.equal(bank.model(IDS).logits, alone.model(IDS).logits)


def test_jobs_of_such_names_write_all_their_tensors(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{k} ", "completion": "and more"}) + "\n" for k in range(4)))
    common = {"data": str(data), "steps": 1, "batch_size": 2, "max_length": 16, "targets": ["q_proj", "gate_proj"]}
    jobs = [{**common, "name": name, "output": str(tmp_path / name), "group_size": 16} for name in ("mlp", "layers")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_many(jobs)
    layers = {name: set(checkpoint.load(tmp_path / name).layers) for name in ("mlp", "layers")}
    assert layers["mlp"] == layers["layers"]
    assert any("mlp" in path for path in layers["mlp"])
