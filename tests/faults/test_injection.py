"""Faults of stock PEFT when an adapter does not fit: the model is left half wrapped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from roadie.testing import randomise

X = torch.arange(48.0).reshape(2, 24) / 48


class _Net(nn.Module):
    """Two layers that a group size of 16 divides, and a third that it does not, which comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "net"}
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.third = nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.norm(self.second(self.first(x))))


def _net() -> _Net:
    torch.manual_seed(0)
    model = _Net().eval()
    model.first.weight.requires_grad_(False)  # a model that is partly frozen already stays so
    return model


FITS = {"target_modules": ["first", "second"], "group_size": 16}
DOES_NOT_FIT = {"target_modules": ["first", "second", "third"], "group_size": 16}
REFUSED = r"must be divisible by group_size \(16\)"


def _picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an injection could change."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "active": [_books(module) for module in model.modules()],
        "config": copy.deepcopy(getattr(model, "config", None)),
    }


def _books(module: nn.Module) -> Any:
    names = ("variant", "group_size", "active_adapters", "merged_adapters", "_disable_adapters")
    books = [copy.deepcopy(getattr(module, name, None)) for name in names] if hasattr(module, "road_theta") else []
    return books, sorted(getattr(module, "peft_config", None) or ())


def _assert_unchanged(model: nn.Module, before: dict[str, Any], call: Callable[[], torch.Tensor]) -> None:
    after = _picture(model)
    values = before.pop("values"), after.pop("values")
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"the model was changed: {changed}"
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert call().shape == (2, 24)


def test_a_failed_get_peft_model_leaves_the_model_as_it_was(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = _net()
        before = _picture(model)
        with pytest.raises(ValueError, match=REFUSED):
            peft.get_peft_model(model, implementation.config(**DOES_NOT_FIT))
        assert not hasattr(model, "peft_config"), "the model was changed: peft_config is left behind"
        _assert_unchanged(model, before, lambda: model(X))
        implementation.adapt(model, **FITS)  # and it can be adapted as if nothing had happened

    fault(check, match="the model was changed")


def test_a_failed_inject_adapter_in_model_leaves_the_model_as_it_was(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = _net()
        before = _picture(model)
        with pytest.raises(ValueError, match=REFUSED):
            peft.inject_adapter_in_model(implementation.config(**DOES_NOT_FIT), model)
        _assert_unchanged(model, before, lambda: model(X))

    fault(check, match="the model was changed")


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"modules_to_save": ["norm"]}], ids=str)
def test_a_failed_add_adapter_leaves_the_model_as_it_was(fault: Any, settings: dict[str, Any]) -> None:
    def check(implementation: Any) -> None:
        model = randomise(implementation.adapt(_net(), "one", **FITS)).eval()
        plain = model(X)
        before = _picture(model)
        extra = {key: value for key, value in settings.items() if key != "bias" or not implementation.is_stock}
        with pytest.raises(ValueError, match=REFUSED):
            model.add_adapter("two", implementation.config(**DOES_NOT_FIT, **extra))
        assert sorted(model.peft_config) == ["one"], "the model was changed: its peft_config has an entry"
        _assert_unchanged(model, before, lambda: model(X))
        assert torch.equal(model(X), plain)
        model.add_adapter("two", implementation.config(**FITS))  # the name is free again
        model.set_adapter("two")

    with torch.no_grad():
        fault(check, match="the model was changed")


def test_a_failed_add_adapter_on_new_layers_leaves_them_unwrapped(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt(_net(), "one", target_modules=["first"], group_size=16)
        before = _picture(model)
        with pytest.raises(ValueError, match=REFUSED):
            model.add_adapter("two", implementation.config(**DOES_NOT_FIT))
        _assert_unchanged(model, before, lambda: model(X))

    fault(check, match="the model was changed")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("broken", ["config that does not fit", "wrong shape"])
def test_a_failed_load_adapter_leaves_the_model_as_it_was(
    fault: Any, tmp_path: Any, broken: str, low_cpu_mem_usage: bool
) -> None:
    def check(implementation: Any) -> None:
        folder = tmp_path / implementation.name
        randomise(implementation.adapt(_net(), **FITS)).save_pretrained(folder)
        _break(folder, broken)
        model = randomise(implementation.adapt(_net(), "one", **FITS)).eval()
        before = _picture(model)
        with pytest.raises((ValueError, RuntimeError)):
            model.load_adapter(folder, adapter_name="two", low_cpu_mem_usage=low_cpu_mem_usage)
        _assert_unchanged(model, before, lambda: model(X))

    fault(check, match="the model was changed")


def _break(folder: Any, broken: str) -> None:
    if broken == "wrong shape":
        weights = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in sorted(weights) if "second.road_theta" in name)
        save_file({**weights, name: weights[name][:-8].clone()}, folder / "adapter_model.safetensors")
        return
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["first", "second", "third"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_failed_from_pretrained_leaves_the_base_model_as_it_was(fault: Any, tmp_path: Any) -> None:
    def check(implementation: Any) -> None:
        folder = tmp_path / implementation.name
        implementation.adapt(_net(), **FITS).save_pretrained(folder)
        _break(folder, "config that does not fit")
        model = _net()
        before = _picture(model)
        with pytest.raises(ValueError, match=r"out_features|got"):
            peft.PeftModel.from_pretrained(model, folder)
        _assert_unchanged(model, before, lambda: model(X))

    fault(check, match="the model was changed")


class _WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.table = nn.Embedding(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)[:, :24]


def test_an_unsupported_layer_after_a_supported_one_leaves_the_model_as_it_was(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = _WithEmbedding()
        before = _picture(model)
        with pytest.raises(ValueError, match=r"Target module Embedding\(8, 32\) is not supported"):
            peft.get_peft_model(model, implementation.config(target_modules=["first", "table"], group_size=16))
        _assert_unchanged(model, before, lambda: model(X))

    fault(check, match="the model was changed")
