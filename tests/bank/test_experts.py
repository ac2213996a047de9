"""A bank of adapters of which some rotate stacked experts, each or all alike: rows are what rotated weights make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.families.checks import BOUND, EXPERTS, Adapted, logits, truth
from tests.families.models import FAMILIES, ROWS, TOKENS, Family
from tests.versions import needs_stacked_experts
from torch import Tensor

import roadie
from roadie.bank import AdapterBank
from roadie.errors import AdapterError
from roadie.experts.forward import AdaptedConfig
from roadie.testing.accuracy import relative_error

pytestmark = needs_stacked_experts

KINDS = ("qwen3_moe", "gpt_oss", "deepseek_v3")


def family(kind: str) -> Family:
    return next(each for each in FAMILIES if each.kind == kind)


def plain(kind: str, implementation: str = "grouped_mm") -> Any:
    model: Any = family(kind).model().float()
    model.set_experts_implementation(implementation)
    return model


def outputs(model: Any, rows: int = ROWS) -> Tensor:
    with torch.no_grad():
        return logits(model(**family("llama").inputs(rows, TOKENS)))


def experts_of(model: Any) -> list[Any]:
    return [module for path, module in model.named_modules() if path.endswith(".experts")]


def filled(kind: str, model: Any, **settings: Any) -> tuple[AdapterBank, Adapted]:
    adapted = Adapted.of(family(kind), with_experts=True)
    bank = AdapterBank(model, slots=4, **settings)
    for name in EXPERTS:
        bank.admit(name, (adapted.model, name))
    return bank, adapted


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_rotated_weights(kind: str, implementation: str) -> None:
    model = plain(kind, implementation)
    base = outputs(model)
    configs = [experts.config for experts in experts_of(model)]
    bank, adapted = filled(kind, model)
    with bank:
        wanted = {name: truth(adapted, name)[0] for name in EXPERTS}
        for names in (["first", None, "second"], ["second", "second", "first"], ["first"] * ROWS):
            with bank.rows(names):
                got = outputs(model)
            for row, name in enumerate(names):
                assert relative_error(got[row], base[row] if name is None else wanted[name][row]) <= BOUND, (names, row)
        assert torch.equal(outputs(model), base)
        with bank.rows([None] * ROWS):
            assert relative_error(outputs(model), base) <= BOUND
    assert [experts.config for experts in experts_of(model)] == configs
    assert torch.equal(outputs(model), base)


def test_blends_inverses_and_replacements_are_those_of_layers() -> None:
    model = plain("gpt_oss")
    base = outputs(model)
    bank, adapted = filled("gpt_oss", model)
    with bank:
        with bank.rows([{"first": 1.0}, {"first": 0.5}, None]):
            got = outputs(model)
        assert relative_error(got[0], truth(adapted, "first")[0][0]) <= BOUND
        assert relative_error(got[1], truth(adapted, "first")[0][1]) > BOUND
        bank.replace("first", (adapted.model, "second"))
        with bank.rows(["first", "second", None]):
            got = outputs(model)
        assert relative_error(got[0], truth(adapted, "second")[0][0]) <= BOUND
        bank.evict("first")
        bank.evict("second")
        bank.grow(8)
        bank.admit("first", (adapted.model, "first"))
        with bank.rows(["first", None, "first"]):
            got = outputs(model)
        assert relative_error(got[2], truth(adapted, "first")[0][2]) <= BOUND
        assert relative_error(got[1], base[1]) <= BOUND


def test_static_slots_are_read_where_they_lie() -> None:
    model = plain("qwen3_moe")
    bank, adapted = filled("qwen3_moe", model)
    with bank:
        held = bank.slots(["first", "second", None])
        slots = held.clone()
        with bank.rows(slots, static=True):
            before = outputs(model)
            slots.copy_(held.flip(0))
            after = outputs(model)
        for got, names in ((before, ["first", "second", None]), (after, [None, "second", "first"])):
            for row, name in enumerate(names):
                if name is not None:
                    assert relative_error(got[row], truth(adapted, name)[0][row]) <= BOUND


def test_what_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    adapted = Adapted.of(family("qwen3_moe"), with_experts=True)
    value = roadie.bank.live.live_adapter(adapted.model, "first")
    model = plain("qwen3_moe")
    with AdapterBank(model, slots=2) as bank:
        path = "model.layers.0.mlp.experts.road_down"
        layer = value.layers[path]
        short = roadie.LayerParameters(layer.theta[:32], layer.alpha[:32], layer.variant, layer.stages)
        with pytest.raises(AdapterError, match=r"got adapter 'a' with 64 outputs.*road_down.*wanted 128"):
            bank.admit("a", roadie.Adapter({**value.layers, path: short}))
        across = roadie.LayerParameters(layer.theta, layer.alpha, layer.variant, 64)
        with pytest.raises(AdapterError, match="group_size=64 for the 32 outputs of one expert"):
            bank.admit("a", roadie.Adapter({path: across}))
        assert not any(isinstance(experts.config, AdaptedConfig) for experts in experts_of(model))
    model.config._experts_implementation = "deepgemm"
    said = r"experts.road_.*got experts_implementation='deepgemm'.*grouped_mm'\)(\n|$)"
    with AdapterBank(model, slots=2) as bank, pytest.raises(AdapterError, match=said):
        bank.admit("a", value)
    dense: Any = family("llama").model()
    with AdapterBank(dense, slots=2) as bank, pytest.raises(AdapterError, match="not a linear layer of the model"):
        bank.admit("a", value)


def test_a_bank_under_an_adapted_model_comes_first() -> None:
    adapted = Adapted.of(family("qwen3_moe"), with_experts=True)
    model = copy.deepcopy(adapted.model)
    model.set_adapter("second")
    both = copy.deepcopy(adapted.model)
    both.base_model.set_adapter(["first", "second"])
    with AdapterBank(model, slots=2) as bank, torch.no_grad():
        bank.admit("first", (adapted.model, "first"))
        batch = family("qwen3_moe").inputs(ROWS, TOKENS)
        with bank.rows(["first"] * ROWS):
            assert relative_error(logits(model(**batch)), logits(both(**batch))) <= BOUND
        assert relative_error(logits(model(**batch)), truth(adapted, "second")[0]) <= BOUND
    assert isinstance(experts_of(model)[0].config, AdaptedConfig)
