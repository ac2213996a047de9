"""A config that was read from a file, for a new adapter; heads that a task trains whole; and loads that fail late."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import roadie
from roadie import checkpoint
from roadie.errors import CheckpointError
from roadie.testing import randomise, tiny_llama

SETTINGS = {"target_modules": ["q_proj", "gate_proj"], "group_size": 16}
IDS = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, **settings) -> Path:
    """A folder with an adapter of the tiny llama."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**{**SETTINGS, **settings}))
    randomise(model).save_pretrained(str(folder))
    return folder


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def wider():
    return tiny_llama(hidden_size=32, intermediate_size=96)


NEW = {
    "get_peft_model": lambda model, config: roadie.get_peft_model(model, config),
    "peft.get_peft_model": lambda model, config: peft.get_peft_model(model, config),
    "add_adapter": lambda model, config: _added(model, config),
    "add_adapter after inference_mode": lambda model, config: _added(model, config, inference_mode=False),
}


def _added(model, config, **changes):
    adapted = roadie.get_peft_model(model, roadie.RoadConfig(**SETTINGS), adapter_name="first")
    for key, value in changes.items():
        setattr(config, key, value)
    adapted.add_adapter("default", config)
    adapted.set_adapter("default")
    return adapted


@pytest.mark.parametrize("door", NEW)
def test_a_config_that_was_read_makes_a_new_adapter_of_another_model_that_is_trained(door, tmp_path):
    folder = saved(tmp_path / "old")
    content = json.loads((folder / "adapter_config.json").read_text())
    content |= {"base_model_name_or_path": "some/other", "revision": "abc"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of the other base model
        model = NEW[door](wider(), roadie.RoadConfig.from_pretrained(folder))
    wanted = {name for name, _ in model.named_parameters() if name.endswith(".default")}
    assert len(wanted) == 8
    if door != "add_adapter after inference_mode":  # which is what a load sets too: nothing else is touched then
        config = model.peft_config["default"]
        assert (config.inference_mode, config.base_model_name_or_path, config.revision) == (False, None, None)
    assert trained(model) == wanted
    assert all(
        torch.equal(p, torch.full_like(p, float("alpha" in n))) for n, p in model.named_parameters() if n in wanted
    )


def test_weights_that_are_missing_or_a_pickle_do_not_matter_to_a_new_adapter(tmp_path):
    folder = saved(tmp_path)
    (folder / checkpoint.WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    assert trained(roadie.get_peft_model(tiny_llama(), roadie.RoadConfig.from_pretrained(folder)))
    (folder / "adapter_model.bin").unlink()
    assert trained(roadie.get_peft_model(tiny_llama(), roadie.RoadConfig.from_pretrained(folder)))


def test_loading_with_a_config_that_was_read_looks_at_the_weights_and_freezes_as_before(tmp_path, portrait):
    folder = saved(tmp_path)
    model = roadie.PeftModel.from_pretrained(tiny_llama(), folder, config=roadie.RoadConfig.from_pretrained(folder))
    assert trained(model) == set()
    base = wider()
    before = portrait(base)
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        roadie.PeftModel.from_pretrained(base, folder, config=roadie.RoadConfig.from_pretrained(folder))
    assert portrait(base) == before


def test_layers_beyond_those_that_the_file_names_are_told_of(tmp_path):
    folder = saved(tmp_path, target_modules="all-linear")
    with pytest.warns(
        RuntimeWarning, match=r"14 layers are adapted, and 7 of the same kinds are not, such as 'model\.layers\.2"
    ):
        roadie.get_peft_model(tiny_llama(num_hidden_layers=3), roadie.RoadConfig.from_pretrained(folder))


HEADS = {
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
}


def bert(task: str, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return HEADS[task][0](BertConfig(vocab_size=64, max_position_embeddings=64, **sizes, **settings)).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["query", "classifier", "qa_outputs"]], ids=str)
@pytest.mark.parametrize("task", HEADS)
def test_the_head_of_a_task_is_trained_whole_and_no_target(task, targets, tmp_path):
    head = HEADS[task][1]
    model = peft.get_peft_model(bert(task, num_labels=2), roadie.RoadConfig(target_modules=targets, task_type=task))
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "road_theta")}
    assert adapted
    assert not any(name.startswith(head) for name in adapted)
    assert any(f"{head}.modules_to_save.default.weight" in name for name in trained(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.eval().save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["modules_to_save"] == [
        name for name in ("classifier", "score", "qa_outputs") if name in content["modules_to_save"]
    ]
    again = roadie.PeftModel.from_pretrained(bert(task, num_labels=2), str(tmp_path)).eval()
    ids = torch.arange(6).view(1, 6)
    for ours, theirs in zip(model(ids).to_tuple(), again(ids).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)


def _without_weights(folder: Path) -> None:
    (folder / checkpoint.WEIGHTS_NAME).unlink()


def _without_head(folder: Path) -> None:
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
    save_file({key: t for key, t in tensors.items() if ".road_" in key}, folder / checkpoint.WEIGHTS_NAME)


def _with_strange_keys(folder: Path) -> None:
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
    save_file(
        {key.replace(".encoder.", ".decoder."): t for key, t in tensors.items()}, folder / checkpoint.WEIGHTS_NAME
    )


LATE = {
    "no weights": (_without_weights, {}, "Can't find weights"),
    "no head": (_without_head, {}, "got no base_model.model.classifier"),
    "strange keys": (_with_strange_keys, {}, "no adapted layer of the model has a place for"),
    "a head of another size": (lambda folder: None, {"num_labels": 7}, "size mismatch for .*classifier"),
}


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("case", LATE)
def test_a_load_that_fails_late_leaves_the_model_as_it_was(case, door, is_trainable, tmp_path, portrait):
    spoil, settings, says = LATE[case]
    if case == "no weights" and is_trainable and door == "load_adapter":
        pytest.skip("the config may as well be meant for a new adapter, and PEFT raises before any value comes")
    config = {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"}
    roadie.get_peft_model(bert("TOKEN_CLS", num_labels=4), roadie.RoadConfig(**config)).save_pretrained(str(tmp_path))
    spoil(tmp_path)
    model = bert("TOKEN_CLS", **{"num_labels": 4, **settings})
    if door == "load_adapter":
        model = peft.get_peft_model(model, roadie.RoadConfig(**config), adapter_name="first")
    arguments: dict[str, Any] = {"adapter_name": "late", "is_trainable": is_trainable}

    def load(**more):
        if door == "load_adapter":
            return model.load_adapter(str(tmp_path), **arguments, **more)
        return roadie.PeftModel.from_pretrained(model, str(tmp_path), **arguments, **more)

    before, hooks = portrait(model), _hooks(model)
    with pytest.raises((ValueError, RuntimeError), match=says):
        load()
    assert portrait(model) == before
    assert _hooks(model) == hooks
    if case == "a head of another size":  # PEFT's way to load the rest
        with pytest.warns(UserWarning, match="ignored because you passed"):
            load(ignore_mismatched_sizes=True)


def test_what_raises_after_the_injection_leaves_model_and_config_as_they_were(monkeypatch, portrait):
    """Gradient checkpointing has PEFT add a hook, and whatever comes later may fail."""
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    config = roadie.RoadConfig(**SETTINGS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    before, settings, hooks = portrait(model), config.to_dict(), _hooks(model)

    def fails(*_, **__):
        raise TypeError("late")

    monkeypatch.setattr(peft.PeftModelForCausalLM, "__init__", _then(peft.PeftModelForCausalLM.__init__, fails))
    with pytest.raises(TypeError, match="late"):
        roadie.get_peft_model(model, config)
    assert portrait(model) == before
    assert config.to_dict() == settings
    assert _hooks(model) == hooks


def _hooks(model):
    return [dict(module._forward_hooks) for module in model.modules()]


def _then(first, second):
    def both(*args, **kwargs):
        first(*args, **kwargs)
        second()

    return both


def test_a_state_dict_that_fits_nowhere_later_takes_nothing_back(tmp_path):
    """Only a load that has just added an adapter takes it away again."""
    folder = saved(tmp_path)
    model = roadie.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    wanted = model(IDS).logits
    stranger = {key.replace("layers", "blocks"): t for key, t in load_file(folder / checkpoint.WEIGHTS_NAME).items()}
    with pytest.raises(CheckpointError, match="no adapted layer of the model has a place for"):
        peft.set_peft_model_state_dict(model, stranger)
    assert torch.equal(model(IDS).logits, wanted)


def llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 64, **vision}
    vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def _of_2024(key: str) -> str:
    """A key of a LLaVA adapter as transformers 4.40 to 4.51 named its modules."""
    key = key.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    return key.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_adapters_of_an_old_layout_are_loaded_whole(door, tmp_path):
    settings = {"target_modules": ["q_proj", "up_proj", "fc1"], "group_size": 16}
    model = randomise(roadie.get_peft_model(llava(), roadie.RoadConfig(**settings))).eval()
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / checkpoint.WEIGHTS_NAME)
    old = {_of_2024(key): tensor for key, tensor in tensors.items()}
    assert not set(old) & set(tensors)
    save_file(old, tmp_path / checkpoint.WEIGHTS_NAME)
    if door == "from_pretrained":
        loaded = roadie.PeftModel.from_pretrained(llava(), str(tmp_path))
    else:
        loaded = roadie.get_peft_model(llava(), roadie.RoadConfig(**settings), adapter_name="first")
        loaded.load_adapter(str(tmp_path), adapter_name="default")
    theirs = dict(loaded.named_parameters())
    ours = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".default")}
    assert len(ours) == 8
    assert all(torch.equal(theirs[name], parameter) for name, parameter in ours.items())


def test_a_key_mapping_of_the_user_is_followed_and_without_it_nothing_is_loaded_in_part(tmp_path, portrait):
    folder = saved(tmp_path)
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
    save_file({k.replace("layers.1.", "blocks.1."): t for k, t in tensors.items()}, folder / checkpoint.WEIGHTS_NAME)
    base = tiny_llama()
    before = portrait(base)
    with pytest.raises(CheckpointError, match=r"got 4 tensors .* such as .*blocks\.1\."):
        roadie.PeftModel.from_pretrained(base, folder)
    assert portrait(base) == before
    loaded = roadie.PeftModel.from_pretrained(base, folder, key_mapping={r"blocks\.": "layers."})
    assert all(torch.equal(loaded.get_parameter(f"{key}.default"), tensor) for key, tensor in tensors.items())


def test_layers_that_the_file_lacks_are_named_by_load_adapter_too(tmp_path):
    folder = saved(tmp_path)
    model = roadie.PeftModel.from_pretrained(tiny_llama(), folder)
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
    save_file({key: t for key, t in tensors.items() if "layers.1." not in key}, folder / checkpoint.WEIGHTS_NAME)
    with pytest.warns(
        UserWarning, match=r"Found missing adapter keys .*layers\.1\.self_attn\.q_proj\.road_alpha\.part"
    ):
        model.load_adapter(folder, adapter_name="part")


def test_tensors_that_are_not_roads_and_find_no_place_are_named(tmp_path):
    folder = saved(tmp_path)
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
    save_file({**tensors, "base_model.model.nowhere.weight": torch.ones(2)}, folder / checkpoint.WEIGHTS_NAME)
    with pytest.warns(UserWarning, match=r"were not loaded: \['base_model\.model\.nowhere\.weight'\]"):
        roadie.PeftModel.from_pretrained(tiny_llama(), folder)
