"""Which layers a job adapts: those that can be adapted, and what is passed over is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.engine.targets import adapted_layers
from roadie.errors import UnsupportedLayer
from roadie.rotation import Variant
from roadie.testing import tiny_llama
from roadie.training.many import train_many


def _mamba() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "time_step_rank": 4, "num_hidden_layers": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, pad_token_id=0, use_mambapy=False))


def _phimoe() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes, **heads))


@pytest.mark.parametrize(("make", "refused", "adapted"), [(_mamba, "dt_proj", 2), (_phimoe, "router", 8)])
def test_layers_that_cannot_be_adapted_are_left_out_or_refused_by_name(
    make: Any, refused: str, adapted: int, caplog: Any
) -> None:
    model = make()
    layers = adapted_layers(model, {"group_size": 2})
    assert len(layers) == adapted
    assert refused in caplog.text
    assert not any(refused in layer.path for layer in layers)
    for targets in ((layers[0].path, refused), f".*({refused}|in_proj)"):
        with pytest.raises(UnsupportedLayer, match=f"got target '.*{refused}'"):
            adapted_layers(model, {"group_size": 2, "target_modules": targets})


def test_names_that_match_nothing_are_named() -> None:
    with pytest.warns(RuntimeWarning, match=r"targets were ignored: 'v_prj' matches no module \(nearest: v_proj"):
        layers = adapted_layers(tiny_llama(), {"target_modules": ("q_proj", "v_prj")})
    assert len(layers) == 2


def test_a_layer_that_gives_a_tuple_after_all_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: (x, x)
    bank = TrainableBank(torch.device("cpu"))
    bank.join({"a": [AdaptedLayer("0", 4, Variant.ROAD_1, (2,), None)]})
    bank.make_tables()
    refused = pytest.raises(UnsupportedLayer, match="0: got a tuple of 2 from Linear; wanted a tensor")
    with bank.attached(model, ["0"]), bank.routed(torch.tensor([0, -1])), refused:
        model(torch.randn(2, 4))


def test_jobs_of_one_run_say_once_what_is_left_out(some_jobs: Any, tiny_path: Any) -> None:
    jobs = some_jobs(2, targets=["q_proj", "v_prj"], group_size=64, steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_many(jobs, model=str(tiny_path))
    assert sum("v_prj" in str(warning.message) for warning in caught) == 1
