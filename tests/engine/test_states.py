"""What is saved of a tenant goes on as if nothing had been; and adapters begin as tenants."""

from __future__ import annotations

import json

import pytest
import torch
from tests.engine.tenants import KINDS, config, engine, filled, parameters, row

import roadie
from roadie import checkpoint
from roadie.engine import AdamSettings, TenantState
from roadie.engine.tenants import OPTIMISER_NAME
from roadie.errors import AdapterError, CheckpointError, NotFinite
from roadie.testing import random_adapter, tiny_llama

STEP = AdamSettings(1e-2, weight_decay=0.1)


def steps(made, name: str, *seeds: int) -> None:
    for seed in seeds:
        made.forward_backward(name, [row(seed, 6)], "cross_entropy")
        made.optim_step(name, STEP)
    made.run()


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_state_goes_on_with_the_same_bits(kind, tmp_path):
    first, second = engine(), engine()
    first.create("a", config(kind))
    steps(first, "a", 1, 2)
    state = first.state("a")
    steps(first, "a", 3, 4)
    state.result().save(tmp_path / "a")
    second.create("again", TenantState.load(tmp_path / "a"))
    steps(second, "again", 3, 4)
    assert all(map(torch.equal, parameters(first, "a"), parameters(second, "again")))
    assert second.state("again")
    later = second.optim_step("again", STEP)
    second.run()
    assert later.exception() is not None
    final = second.state("again")
    second.run()
    assert final.result().step == 4
    assert final.result().adapter.config["variant"] == KINDS[kind]["variant"]


def test_a_state_without_moments_begins_anew_from_its_folder_too(tmp_path):
    first = engine()
    first.create("a", config(0))
    steps(first, "a", 1)
    asked = first.state("a")
    first.run()
    TenantState(asked.result().adapter).save(tmp_path / "a")
    first.create("again", TenantState.load(tmp_path / "a"))
    first.create("anew", asked.result().adapter)
    for name in ("again", "anew"):
        steps(first, name, 2)
    assert all(map(torch.equal, parameters(first, "again"), parameters(first, "anew")))


def test_the_folder_is_an_adapter_as_peft_loads_it(tmp_path):
    made = engine()
    made.create("a", config(0))
    filled(made, "a")
    state = made.state("a")
    made.run()
    state.result().save(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        OPTIMISER_NAME,
    }
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"], written["inference_mode"]) == ("ROAD", "CAUSAL_LM", True)
    model = roadie.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    asked = made.forward("a", [row(1, 4)], "cross_entropy")
    made.run()
    targets = torch.as_tensor(row(1, 4).targets)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(row(1, 4).tokens)[None]).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(4), targets]
    assert ids.numel() == 4
    assert torch.allclose(asked.result().logprobs[0], expected, atol=1e-5)


def test_an_adapter_begins_anew_with_its_weights(tmp_path):
    model = tiny_llama()
    adapter = random_adapter(model, 3, variant="road_2", group_size=8)
    checkpoint.save(adapter, tmp_path / "a")
    made = engine(model)
    made.create("value", adapter)
    made.create("folder", str(tmp_path / "a"))
    states = [made.state(name) for name in ("value", "folder")]
    made.run()
    for state in states:
        found = state.result()
        assert found.step == 0
        assert found.adapter.layers.keys() == adapter.layers.keys()
        for path, layer in adapter.layers.items():
            assert torch.equal(found.adapter.layers[path].theta, layer.theta)
            assert torch.equal(found.adapter.layers[path].alpha, layer.alpha)
    assert len(made.bank.families) == 1


def test_a_share_stays_one(tmp_path):
    made, again = engine(), engine()
    made.create("a", {"target_modules": ["q_proj"], "group_size": 8, "share": "1/2"})
    steps(made, "a", 1)
    state = made.state("a")
    made.run()
    state.result().save(tmp_path / "a")
    again.create("a", TenantState.load(tmp_path / "a"))
    for each in (made, again):
        steps(each, "a", 2)
    assert all(map(torch.equal, parameters(made, "a"), parameters(again, "a")))
    (stack,) = again.bank.families[0].stacks
    assert stack.trained is not None
    assert not stack.parameters[:, 0, 0][:, ~stack.trained].any()


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    made = engine()
    other = random_adapter(tiny_llama(hidden_size=32), 1, variant="road_1", group_size=8)
    with pytest.raises(AdapterError, match=r"got \d+ values for 'model.layers.0.*the model has \d+; use"):
        made.create("a", other)
    own = random_adapter(made.model, 1, variant="road_1", group_size=8)
    bad = made.create("a", TenantState(own, 3, {"model.layers.0.mlp.up_proj": torch.zeros(2, 2, 4)}))
    waiting = made.forward_backward("a", [row(1, 4)], "cross_entropy")
    good = made.create("b", own)
    made.run()
    assert isinstance(bad.exception(), AdapterError)
    assert isinstance(waiting.exception(), AdapterError)
    assert good.result() is None
    assert made.tenants == ("b",)
    checkpoint.save(own, tmp_path)
    (tmp_path / OPTIMISER_NAME).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="got a damaged file"):
        TenantState.load(tmp_path)
    assert not isinstance(bad.exception(), NotFinite)
