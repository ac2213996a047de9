"""Rows of a PEFT model by name and by blend: what the bank underneath keeps, and when it looks again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roadie
from roadie import adapter_algebra
from roadie.bank.live import live_adapter
from roadie.errors import AdapterError, ConfigError, RoutingError
from roadie.testing import tiny_llama
from roadie.testing.models import randomise
from roadie.tuner.routing import shared_routing

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9], [2, 6, 10], [3, 7, 11], [4, 8, 12]])


def _config(**settings: Any) -> roadie.RoadConfig:
    return roadie.RoadConfig(**{"target_modules": TARGETS, "group_size": 8, **settings})


def _model(*names: str, scale: float = 0.3, **settings: Any) -> Any:
    """A tiny llama with adapters near the identity, whose blocks have logarithms."""
    model = roadie.get_peft_model(tiny_llama(), _config(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, _config(**settings))
    for seed, name in enumerate(names):
        randomise(model, seed=seed, adapter=name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "road_theta" in path:
                parameter.mul_(scale)
            elif "road_alpha" in path:
                parameter.copy_(1 + scale * (parameter - 1).clamp(-1, 1))
    return model.eval()


def _logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, **arguments).logits
    return logits


def _bank(model: nn.Module) -> roadie.AdapterBank:
    return shared_routing(model).residents.bank


def _alone(model: Any, adapter: roadie.Adapter) -> Tensor:
    """What a plain model in a bank of its own gives, all rows with one adapter."""
    plain = tiny_llama().eval()
    plain.load_state_dict(copy.deepcopy(model).unload().state_dict())
    with roadie.AdapterBank(plain) as bank:
        bank.admit("only", adapter)
        with bank.rows(["only"] * len(IDS)):
            return _logits(plain)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_row_may_wish_for_a_blend(variant: str) -> None:
    model = _model("a", "b", variant=variant)
    rows = [{"a": 0.7, "b": 0.3}, "b", {"a": -1}, "__base__"]
    mixed = _logits(model, adapter_names=rows)
    a, b = live_adapter(model, "a"), live_adapter(model, "b")
    blended = _alone(model, adapter_algebra.blend_adapters([a, b], [0.7, 0.3]))
    backwards = _alone(model, adapter_algebra.inverse(a))
    with model.disable_adapter():
        base = _logits(model)
    for row, wanted in enumerate([blended, _alone(model, b), backwards, base]):
        torch.testing.assert_close(mixed[row], wanted[row])
    assert not torch.allclose(mixed[0], base[0])
    with roadie.rows(model, rows):
        assert torch.equal(_logits(model), mixed)


def test_a_blend_of_weight_one_is_the_adapter_bit_for_bit() -> None:
    model = _model("a", "b")
    assert torch.equal(_logits(model, adapter_names=[{"a": 1.0}] * 4), _logits(model, adapter_names=["a"] * 4))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_blends_in_generate(task: str | None) -> None:
    model = _model("a", "b", task_type=task)
    rows = [{"a": 0.5, "b": 0.5}, "a", "b", None]
    made = model.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, wish in enumerate(rows):
        alone = model.generate(
            input_ids=IDS[row : row + 1], adapter_names=[wish], max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert torch.equal(made[row], alone[0])


@pytest.mark.parametrize("how", ["counted", "through .data", "another parameter", "load"])
def test_changed_parameters_are_seen(how: str) -> None:
    model = _model("a", "b")
    rows = ["a", "b", {"a": 0.5}, "a"]
    before = _logits(model, adapter_names=rows)
    layer = next(module for module in model.modules() if isinstance(module, roadie.RoadLayer))
    theta = layer.road_theta["a"]
    if how == "counted":
        with torch.no_grad():
            theta.add_(0.5)
    elif how == "through .data":
        theta.data.add_(0.5)
    elif how == "another parameter":
        layer.road_theta["a"] = nn.Parameter(theta.detach() + 0.5)
    else:
        state = {name: tensor + 0.5 for name, tensor in model.state_dict().items() if name.endswith("road_theta.a")}
        model.load_state_dict(state, strict=False)
    after = _logits(model, adapter_names=rows)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [False, True, False, False]
    model.set_adapter("a")
    torch.testing.assert_close(after[0], _logits(model)[0])


def test_parameters_that_change_within_a_block_are_seen() -> None:
    model = _model("a", "b")
    with roadie.rows(model, ["a", "b", {"a": 2.0}, "a"]):
        before = _logits(model)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "road_theta.a" in path:
                    parameter.add_(0.1)
        after = _logits(model)
    torch.testing.assert_close(after, _logits(model, adapter_names=["a", "b", {"a": 2.0}, "a"]))
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[2], before[2])


def test_other_rows_are_a_lookup_and_no_new_tables() -> None:
    model = _model("a", "b", "c")
    _logits(model, adapter_names=["a", "b", "c", "a"])
    bank = _bank(model)
    admissions, version = bank._admissions, bank.storage_version
    _logits(model, adapter_names=["c", "c", "a", "__base__"])
    assert (bank._admissions, bank.storage_version) == (admissions, version)
    assert _bank(model) is bank


def test_equal_wishes_are_looked_up_once_as_long_as_they_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = _model("a", "b"), ["a", "b", "__base__", "a"]
    looked_up: list[Any] = []
    slots_of = roadie.AdapterBank.slots_of

    def noted(bank: roadie.AdapterBank, wishes: Any) -> Tensor:
        looked_up.append(wishes)
        return slots_of(bank, wishes)

    monkeypatch.setattr(roadie.AdapterBank, "slots_of", noted)
    first = _logits(model, adapter_names=names)
    torch.testing.assert_close(_logits(model, adapter_names=names), first, rtol=0, atol=0)
    assert len(looked_up) == 1
    next(p for path, p in model.named_parameters() if "road_theta.b" in path).data.add_(1.0)
    other = _logits(model, adapter_names=names)
    assert len(looked_up) == 2
    assert not torch.equal(other[1], first[1])
    torch.testing.assert_close(other[2], first[2], rtol=0, atol=0)
    for turn in range(20):  # slots that are held for wishes of before are given back
        randomise(model, seed=turn, adapter="b")
        _logits(model, adapter_names=names)
    assert _bank(model).num_slots == 16


def test_rows_read_the_bank_that_names_filled() -> None:
    """The paths of layers are others in the PeftModel than in the model that it holds."""
    model = _model("a", "b")
    rows = ["a", "b", "__base__", "a"]
    wanted = _logits(model, adapter_names=rows)
    bank = _bank(model)
    admissions = bank._admissions
    for called in (model, model.base_model, model.get_base_model()):
        with torch.no_grad(), roadie.rows(called, rows):
            assert torch.equal(called(input_ids=IDS).logits, wanted)
    assert _bank(model) is bank
    assert bank._admissions == admissions


def test_a_hook_on_a_base_layer_gets_what_the_layer_gave_when_rows_come_again() -> None:
    model = _model("a", "b")
    rows = ["a", "b", "__base__", "a"]
    for _ in range(2):
        wanted = _logits(model, adapter_names=rows)
    layer = next(module for module in model.modules() if isinstance(module, roadie.RoadLayer))
    given: list[tuple[Tensor, Tensor]] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, y: given.append((y, y.clone())))
    assert torch.equal(_logits(model, adapter_names=rows), wanted)
    assert torch.equal(*given[0])


class FirstRow(nn.Module):
    """Without tokens it has the rows in front; with tokens its layer is given those of the first row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(x if x.dim() == 2 else x[0])
        return result


def test_rows_that_come_again_with_tokens_are_looked_at_again() -> None:
    """As many tokens as rows: sizes alone do not tell."""
    model = roadie.get_peft_model(FirstRow(), _config(target_modules=["up"]), adapter_name="a").eval()
    model.add_adapter("b", _config(target_modules=["up"]))
    rows = ["a", "b", "__base__", "a"]
    with torch.no_grad():
        for _ in range(2):
            model(torch.zeros(4, 16), adapter_names=rows)
        with pytest.raises(RoutingError, match="the sequence in front, or some of the tokens"):
            model(torch.zeros(4, 4, 16), adapter_names=rows)


def test_deleted_adapters_leave_the_bank_and_their_names_can_come_back() -> None:
    model = _model("a", "b")
    _logits(model, adapter_names=["a", "b", "a", "b"])
    model.delete_adapter("b")
    with pytest.raises(RoutingError, match="non-existing"):
        _logits(model, adapter_names=["a", "b", "a", "b"])
    _logits(model, adapter_names=["a"] * 4)
    assert _bank(model).names == ("a",)
    model.add_adapter("b", _config())
    got = _logits(model, adapter_names=["b"] * 4)
    with model.disable_adapter():
        assert torch.equal(got, _logits(model))


def test_layers_that_come_later_are_served() -> None:
    model = _model("a")
    _logits(model, adapter_names=["a"] * 4)
    model.add_adapter("wide", _config(target_modules=[*TARGETS, "up_proj"]))
    randomise(model, seed=7, adapter="wide")
    mixed = _logits(model, adapter_names=["wide", "a", "wide", "a"])
    for row, name in enumerate(["wide", "a", "wide", "a"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], _logits(model)[row])


def test_a_float64_model_is_not_rounded_to_float32() -> None:
    model = _model("a", "b").double()
    mixed = _logits(model, adapter_names=["a", "b", "a", "b"])
    model.set_adapter("b")
    assert float((mixed[1] - _logits(model)[1]).abs().max()) < 1e-12


def test_many_adapters_grow_the_bank() -> None:
    names = [f"n{index}" for index in range(24)]
    model = _model(*names)
    for start in range(0, 24, 4):
        mixed = _logits(model, adapter_names=names[start : start + 4])
        model.set_adapter(names[start])
        torch.testing.assert_close(mixed[0], _logits(model)[0])
    assert set(_bank(model).names) == set(names)


def test_blends_in_training_reach_every_part() -> None:
    model = _model("a", "b")
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("road_" in path)
    rows = [{"a": 0.7, "b": 0.3}, "a", "b", "__base__"]
    trained = model(input_ids=IDS, adapter_names=rows).logits
    torch.testing.assert_close(trained.detach(), _logits(model, adapter_names=rows))
    trained[0].square().mean().backward()
    gradients = {path: p.grad for path, p in model.named_parameters() if "road_" in path}
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in gradients.values())
    path, parameter = next((path, p) for path, p in model.named_parameters() if "road_theta.b" in path)
    step = torch.zeros_like(parameter)
    step.view(-1)[0] = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step)
            values.append(model(input_ids=IDS, adapter_names=rows).logits[0].double().square().mean())
            parameter.sub_(sign * step)
    slope = float(values[0] - values[1]) / 2e-2
    found = gradients[path]
    assert found is not None
    assert abs(slope - float(found.view(-1)[0])) <= 2e-2 * abs(slope) + 1e-7  # a difference quotient in float32


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([{"a": 0.5, "nobody": 0.5}] * 4, RoutingError, "non-existing adapter.*nobody"),
        ([{"a": float("nan")}] * 4, RoutingError, "finite"),
        ([["a"]] * 4, RoutingError, "wanted an adapter's name"),
        ([{"a": 0.5, "other": 0.5}] * 4, ConfigError, "group_size"),
        ([{"turned": 0.5}] * 4, AdapterError, "logarithm"),
        (["a"] * 3, RoutingError, "Length of `adapter_names` should be the same"),
    ],
    ids=["unknown", "weight", "kind", "group sizes", "no logarithm", "length"],
)
def test_what_cannot_be_wished_for(rows: list[Any], error: type[Exception], match: str) -> None:
    model = _model("a", "turned", variant="road_2")
    model.add_adapter("other", _config(group_size=4))
    randomise(model, seed=3, adapter="other")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "road_alpha.turned" in path:
                parameter[0] = -1.0  # one of a pair: a reflection
            if "road_theta.turned" in path:
                parameter.zero_()
    before = _logits(model, adapter_names=["a"] * 4)
    with pytest.raises(error, match=match):
        _logits(model, adapter_names=rows)
    assert torch.equal(_logits(model, adapter_names=["a"] * 4), before)


@torch.no_grad()
def test_rows_of_a_block_follow_adapters_that_others_have_put_in_anew() -> None:
    """An inner block puts the changed adapter into another slot of the bank; the outer one must not go on with the old slot."""
    model = _model("a", "b").requires_grad_(False)
    names = ["a", "b", "b", "a"]
    with roadie.rows(model, names):
        before = _logits(model)
        next(layer for layer in model.modules() if hasattr(layer, "road_theta")).road_theta["a"] += 0.5
        with roadie.rows(model, names[::-1]):
            _logits(model)
        after = _logits(model)
    with roadie.rows(model, names):
        wanted = _logits(model)
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)
