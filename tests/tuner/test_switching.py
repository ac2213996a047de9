"""Switching adapters off and on, and deleting the active one: what was frozen stays so, and an adapter is active as a whole."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import roadie
from roadie.testing import randomise, tiny_llama

SETTINGS = {"target_modules": ["q_proj", "gate_proj"], "group_size": 16, "input_stages": [8]}
WHOLE = {**SETTINGS, "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}
IDS = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, flag in flags(model).items() if flag}


def adapted(**settings):
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**{**WHOLE, **settings}))
    model.add_adapter("other", roadie.RoadConfig(**WHOLE))
    return model


def frozen_by_user(model):
    model.requires_grad_(False)


def frozen_rotations(model):
    for name, parameter in model.named_parameters():
        if ".road_alpha." in name or ".road_input." in name:
            parameter.requires_grad_(False)


def frozen_by_peft(model):
    model.set_adapter("other", inference_mode=True)


def trainable_beside(model):
    model.set_requires_grad("other", True)
    model.get_base_model().model.norm.weight.requires_grad_(True)


CASES = (frozen_by_user, frozen_rotations, frozen_by_peft, trainable_beside)


@pytest.mark.parametrize("change", CASES, ids=lambda case: case.__name__)
def test_off_and_on_leaves_every_parameter_trainable_or_frozen_as_it_was(change):
    model = adapted()
    change(model)
    before = flags(model)
    with model.disable_adapter():
        assert not any(flag for name, flag in flags(model).items() if ".road_" in name)
        with model.disable_adapter():
            pass
    assert flags(model) == before
    model.base_model.enable_adapter_layers()  # they are on already
    assert flags(model) == before
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert flags(model) == before


def test_a_loaded_adapter_stays_frozen(tmp_path):
    adapted().save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = roadie.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    with model.disable_adapter():
        pass
    assert trained(model) == set()


def test_lora_beside_stays_as_it_is():
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(target_modules=["q_proj"], group_size=16))
    roadie.add_lora(model, peft.LoraConfig(r=2, target_modules=["q_proj"]), is_trainable=False)
    before = flags(model)
    with model.disable_adapter():
        pass
    assert flags(model) == before


def test_transformers_switches_leave_it_too():
    model = tiny_llama()
    model.add_adapter(roadie.RoadConfig(**SETTINGS), "a")
    model.requires_grad_(False)
    model.disable_adapters()
    model.enable_adapters()
    assert trained(model) == set()


def test_what_is_made_active_while_adapters_are_off_stays_so():
    model = adapted()
    with model.disable_adapter():
        model.set_adapter("other")
    assert trained(model)
    assert all("other" in name.split(".") for name in trained(model))


def test_after_the_active_adapter_is_deleted_the_next_one_is_active_with_its_whole_modules():
    """PEFT leaves modules that only the next one trains whole as they are in the base model."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**SETTINGS))
    model.add_adapter("next", roadie.RoadConfig(**WHOLE))
    randomise(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["next"].weight.mul_(2)
    model.set_adapter("next")
    wanted, wanted_flags = model.eval()(IDS).logits, trained(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "next"
    assert torch.equal(model(IDS).logits, wanted)
    assert trained(model) == wanted_flags
    assert any("lm_head.modules_to_save.next" in name for name in wanted_flags)


def test_after_a_deletion_all_layers_have_the_same_adapter_active():
    """With PEFT each layer takes the first of its own, and the model's is that of the first layer."""
    model = roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(target_modules=["q_proj", "up_proj"], group_size=16))
    for name, target in (("b", "q_proj"), ("a", "up_proj")):
        model.add_adapter(name, roadie.RoadConfig(target_modules=[target], group_size=16))
    randomise(model)
    model.set_adapter("a")
    wanted = model.eval()(IDS).logits
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "a"
    assert torch.equal(model(IDS).logits, wanted)


class _Roads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.broad_proj = nn.Linear(8, 16)

    def forward(self, x):
        return self.broad_proj(x)


def test_deleting_reaches_layers_whose_names_look_like_parameters():
    model = roadie.get_peft_model(_Roads(), roadie.RoadConfig(target_modules=["broad_proj"], group_size=8))
    model.add_adapter("other", roadie.RoadConfig(target_modules=["broad_proj"], group_size=8))
    model.delete_adapter("other")
    assert set(model.base_model.model.broad_proj.road_theta) == {"default"}
    assert model.active_adapter == "default"
