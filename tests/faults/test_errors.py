"""What stock PEFT refuses and we refuse too: an exception that PEFT's handlers catch, with PEFT's opening words.

People and test suites match on both. Ours may be a subclass, and may say more after PEFT's words: what it got, what it
wants, what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import roadie
from roadie.testing import stock_peft, tiny_llama

SETTINGS = {"target_modules": ["0"], "group_size": 8}
X = torch.ones(3, 16)


def _net(c: Any) -> Any:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 32)), c(**SETTINGS), adapter_name="first")
    model.add_adapter("second", c(**SETTINGS))
    return model.eval()


def _inject(model: nn.Module, config: Any) -> Any:
    return peft.get_peft_model(model, config)


def _merged(c: Any) -> Any:
    model = _net(c)
    model.merge_adapter()
    return model


def _safe_merge(c: Any, broken: str) -> None:
    model = _net(c)
    base = model.base_model.model[0].get_base_layer()
    with torch.no_grad():
        getattr(base, broken).view(-1)[0] = float("nan")
    model.merge_adapter(safe_merge=True)


def _layer(c: Any) -> Any:
    return _net(c).base_model.model[0]


def _update_layer(c: Any, **changed: Any) -> None:
    """A setting that is changed after the config has checked itself reaches the layer."""
    config = c(**SETTINGS)
    for name, value in changed.items():
        setattr(config, name, value)
    _layer(c).update_layer("third", config)


def _direct(c: Any, base: nn.Module) -> None:
    layers = roadie if c is roadie.RoadConfig else peft.tuners.road
    layers.Linear(base, "first", c(**SETTINGS))


def _mixed_generate(c: Any, adapters: list[str]) -> None:
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), c(group_size=8)).eval()
    model.generate(torch.ones(2, 3, dtype=torch.long), adapter_names=adapters, max_new_tokens=2, pad_token_id=0)


class _Experts(nn.Module):
    """Expert weights as one parameter, the way mixture-of-experts models hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 8, 8))
        self.router = nn.Linear(8, 2)


def _of_kind(module: nn.Module) -> Callable[[Any], Any]:
    return lambda c: _inject(nn.ModuleDict({"odd": module}), c(target_modules=["odd"], group_size=8))


# Each: what is refused, and the opening words, which stock PEFT's own message must have too.
CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "too few adapter_names": (
        lambda c: _net(c)(X, adapter_names=["first"]),
        "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 3 respectively.",
    ),
    "too many adapter_names": (
        lambda c: _net(c)(X, adapter_names=["first"] * 4),
        "Length of `adapter_names` should be the same as the number of inputs, but got 4 and 3 respectively.",
    ),
    "too few adapter_names for a layer": (
        lambda c: _layer(c)(X, adapter_names=["first"]),
        "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 3 respectively.",
    ),
    "too few adapter_names for generate": (
        lambda c: _mixed_generate(c, ["default"]),
        "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2 respectively.",
    ),
    "unknown adapters in adapter_names": (
        lambda c: _net(c)(X, adapter_names=["zeta", "first", "alpha"]),
        "Trying to infer with non-existing adapter(s): alpha, zeta",
    ),
    "unknown adapters in generate": (
        lambda c: _mixed_generate(c, ["default", "zeta"]),
        "Trying to infer with non-existing adapter(s): zeta",
    ),
    "adapter_names with merged adapters": (
        lambda c: _merged(c)(X, adapter_names=["first"] * 3),
        "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.",
    ),
    "unknown variant": (
        lambda c: c(variant="road_3"),
        "Invalid variant road_3 specified. Please choose from road_1, road_2 or road_4",
    ),
    "no variant": (
        lambda c: c(variant=None),
        "Invalid variant None specified. Please choose from road_1, road_2 or road_4",
    ),
    "unknown variant in a layer": (
        lambda c: _update_layer(c, variant="road_3"),
        "Unsupported variant road_3 for RoadLayer. Supported variants are road_1, road_2, and road_4.",
    ),
    "group size 0": (
        lambda c: c(group_size=0),
        "The group_size must be divisible by 2 when using RoadLayer, but got 0.",
    ),
    "negative group size": (
        lambda c: c(group_size=-2),
        "The group_size must be divisible by 2 when using RoadLayer, but got -2.",
    ),
    "odd group size": (
        lambda c: c(group_size=7),
        "The group_size must be divisible by 2 when using RoadLayer, but got 7.",
    ),
    "group size that does not divide": (
        lambda c: _inject(nn.Sequential(nn.Linear(16, 32)), c(target_modules=["0"], group_size=10)),
        "The out_features of the base layer must be divisible by group_size (10) when using RoadLayer.",
    ),
    "group size that does not divide, second adapter": (
        lambda c: _net(c).add_adapter("third", c(target_modules=["0"], group_size=10)),
        "The out_features of the base layer must be divisible by group_size (10) when using RoadLayer.",
    ),
    "group size that does not divide, in a layer": (
        lambda c: _update_layer(c, group_size=10),
        "The out_features of the base layer must be divisible by group_size (10) when using RoadLayer.",
    ),
    "safe merge into a broken weight": (
        lambda c: _safe_merge(c, "weight"),
        "NaNs detected in the merged weights. The adapter first seems to be broken",
    ),
    "safe merge into a broken bias": (
        lambda c: _safe_merge(c, "bias"),
        "NaNs detected in the merged bias. The adapter first seems to be broken",
    ),
    "Embedding": (_of_kind(nn.Embedding(4, 8)), "Target module Embedding(4, 8) is not supported."),
    "Conv1d": (
        _of_kind(nn.Conv1d(4, 8, 1)),
        "Target module Conv1d(4, 8, kernel_size=(1,), stride=(1,)) is not supported.",
    ),
    "Conv2d": (
        _of_kind(nn.Conv2d(4, 8, 1)),
        "Target module Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1)) is not supported.",
    ),
    "LayerNorm": (
        _of_kind(nn.LayerNorm(8)),
        f"Target module {nn.LayerNorm(8)} is",
    ),
    "a layer made of an Embedding": (
        lambda c: _direct(c, nn.Embedding(4, 8)),
        "Unsupported layer type '<class 'torch.nn.modules.sparse.Embedding'>' encountered, cannot apply RoAd adapter.",
    ),
    "target_parameters": (
        lambda c: c(target_parameters=["experts"]),
        "RoadConfig.__init__() got an unexpected keyword argument 'target_parameters'",
    ),
    "expert parameters as a target module": (
        lambda c: _inject(_Experts(), c(target_modules=["experts"], group_size=8)),
        "Target modules {'experts'} not found in the base model.",
    ),
    "no module of that name": (
        lambda c: _inject(nn.Sequential(nn.Linear(16, 32)), c(target_modules=["nowhere"])),
        "Target modules {'nowhere'} not found in the base model.",
    ),
    "no module that matches": (
        lambda c: _inject(nn.Sequential(nn.Linear(16, 32)), c(target_modules="nowhere")),
        "Target modules nowhere not found in the base model.",
    ),
    "no targets": (
        lambda c: _inject(nn.Sequential(nn.Linear(16, 32)), c(target_modules=[])),
        "No `target_modules` passed but also no `target_parameters` found.",
    ),
    "no linear layer among all-linear": (
        lambda c: _inject(nn.Sequential(nn.ReLU()), c(target_modules="all-linear")),
        "No `target_modules` passed but also no `target_parameters` found.",
    ),
    "targets of an unknown architecture": (
        lambda c: _inject(nn.Sequential(nn.Linear(16, 32)), c()),
        "Please specify `target_modules` in `peft_config`",
    ),
    "adapter name taken": (
        lambda c: _net(c).add_adapter("first", c(**SETTINGS)),
        "Adapter with name 'first' already exists.",
    ),
    "setting an unknown adapter": (lambda c: _net(c).set_adapter("third"), "Adapter third not found."),
    "deleting an unknown adapter": (lambda c: _net(c).delete_adapter("third"), "Adapter third does not exist"),
    "an adapter of another method": (
        lambda c: _net(c).add_adapter("third", peft.LoraConfig(target_modules=["0"])),
        "Cannot combine adapters with different peft types.",
    ),
    "an unknown setting": (
        lambda c: c(strength=2),
        "RoadConfig.__init__() got an unexpected keyword argument 'strength'",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_error_type_and_opening_words_are_those_of_stock_peft(ours: Any, what: str) -> None:
    call, opening = CASES[what]
    with stock_peft() as config, pytest.raises(Exception) as theirs:  # noqa: PT011  its type is the question
        call(config)
    assert str(theirs.value).startswith(opening)
    with pytest.raises(Exception) as got:  # noqa: PT011
        call(ours.config)
    assert isinstance(got.value, theirs.type), f"got {got.type.__name__}; wanted {theirs.type.__name__}"
    assert str(got.value).startswith(opening)


@pytest.mark.parametrize("what", ["Embedding", "Conv2d", "group size that does not divide"])
def test_our_message_names_the_module_and_says_what_to_do(ours: Any, what: str) -> None:
    with pytest.raises(roadie.errors.RoadieError, match=r"'(odd|0)'.*exclude_modules"):
        CASES[what][0](ours.config)
