"""Tenants that train stacked experts, each or all alike, beside others: every one is what it is alone, and in a PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.tenants import engine, filled, gradients, row
from tests.families.models import FAMILIES
from tests.versions import needs_stacked_experts
from torch import Tensor

import roadie
from roadie.engine import AdamSettings, TrainingEngine
from roadie.errors import ConfigError, UnsupportedLayer
from roadie.testing.accuracy import relative_error, unit_roundoff

KINDS = ("each", "shared", None)
OF_A_GRADIENT = (2**9 + 2**12) * unit_roundoff(torch.float32)  # as in test_training

pytestmark = [pytest.mark.filterwarnings("ignore:this adapter has"), needs_stacked_experts]


def model(kind: str = "qwen3_moe") -> Any:
    made: Any = next(each for each in FAMILIES if each.kind == kind).model().float()
    made.config._experts_implementation = "grouped_mm"
    return made


def config(number: int, **settings: Any) -> roadie.RoadConfig:
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"], "group_size": 4}
    variant = ("road_1", "road_2", "road_4")[number // 3 % 3]
    return roadie.RoadConfig(**{**common, "variant": variant, "target_experts": KINDS[number % 3], **settings})


def started(numbers: list[int], kind: str) -> TrainingEngine:
    made = engine(model(kind))
    for number in numbers:
        made.create(f"t{number}", config(number))
    filled(made, *(f"t{number}" for number in numbers))
    return made


def losses(made: TrainingEngine, numbers: list[int]) -> dict[int, float]:
    rows = {n: [row(n, 5, vocabulary=60), row(100 + n, 7, vocabulary=60)] for n in numbers}
    calls = {n: made.forward_backward(f"t{n}", rows[n], "cross_entropy") for n in numbers}
    made.run()
    return {number: call.result().loss for number, call in calls.items()}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_the_same_rows_alone(kind: str) -> None:
    numbers = list(range(6))
    together = started(numbers, kind)
    found = losses(together, numbers)
    for number in numbers:
        alone = started([number], kind)
        assert losses(alone, [number])[number] == pytest.approx(found[number], rel=1e-5)
        for got, wanted in zip(gradients(together, f"t{number}"), gradients(alone, f"t{number}"), strict=True):
            assert wanted.any()
            assert relative_error(got, wanted) <= OF_A_GRADIENT


def in_a_peft_model(
    number: int, kind: str, layers: dict[str, roadie.LayerParameters]
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of theta of the same rows, one by one."""
    adapted: Any = roadie.get_peft_model(model(kind), config(number))
    sites = dict(adapted.get_base_model().named_modules())
    with torch.no_grad():
        for path, layer in layers.items():
            sites[path].road_theta["default"].copy_(layer.theta)
            sites[path].road_alpha["default"].copy_(layer.alpha)
    total = torch.zeros(())
    for each in (row(number, 5, vocabulary=60), row(100 + number, 7, vocabulary=60)):
        logprobs = adapted(each.tokens.unsqueeze(0)).logits[0].log_softmax(-1)
        total = total - (each.weights * logprobs.gather(1, each.targets.unsqueeze(1))[:, 0]).sum()
    total.backward()
    return float(total.detach()), {path: sites[path].road_theta["default"].grad for path in layers}


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_gradients_are_those_of_a_peft_model(number: int) -> None:
    made = started([number], "qwen3_moe")
    loss = losses(made, [number])[number]
    family = made.bank.family_of(f"t{number}")
    layers = family.adapter_layers(family.row(f"t{number}"))
    assert sum("experts" in path for path in layers) == 4
    wanted, thetas = in_a_peft_model(number, "qwen3_moe", layers)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for stack, of_stack in zip(family.stacks, gradients(made, f"t{number}"), strict=True):
        for index, path in enumerate(stack.paths):
            assert relative_error(of_stack[index, 0], thetas[path]) <= OF_A_GRADIENT, path


def test_a_tenant_is_saved_loaded_in_peft_and_goes_on(tmp_path: Path) -> None:
    made = started([0], "qwen3_moe")
    losses(made, [0])
    made.optim_step("t0", AdamSettings(1e-3))
    saved = made.state("t0")
    made.run()
    saved.result().save(tmp_path / "state")
    assert roadie.checkpoint.load(tmp_path / "state").config["target_experts"] == "each"
    again = engine(model())
    again.create("t0", tmp_path / "state")
    again.run()
    assert losses(again, [0])[0] == losses(made, [0])[0]
    assert roadie.PeftModel.from_pretrained(model(), tmp_path / "state")


def test_what_cannot_be_trained_is_refused() -> None:
    made = engine(model())
    with pytest.raises(ConfigError, match="experts have no shares"):
        made.create("a", {**config(0).to_dict(), "share": "1/2"})
    with pytest.raises(ConfigError, match="group_size=64"):
        made.create("a", config(0, group_size=64, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedLayer, match="Llama4TextExperts"):
        engine(model("llama4_text")).create("a", config(0))
