"""Tables are made once a call of the model, for all layers, and a layer that is called by itself makes its own."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tests.kernels.cases import no_compiled_kernel
from tests.laws.tuner import ORDER_OF_SUMS
from torch import Tensor, nn

import roadie
from roadie.kernels import prepare_rotation
from roadie.rotation import rotate
from roadie.sites import parameters
from roadie.testing import randomise, tiny_llama
from roadie.tuner import residents, rotating, tables

D = 16


class Net(nn.Module):
    """Layers one after the other, of which some may be left out."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(num_layers)])

    def forward(self, x: Tensor, used: int | None = None) -> Tensor:
        for layer in self.layers[:used]:
            x = layer(x).sin()
        return x


def _adapted(num_layers: int, **settings: Any) -> Any:
    config = roadie.RoadConfig(target_modules=r"layers\.\d+", **settings)
    return randomise(roadie.get_peft_model(Net(num_layers), config), seed=1)


def _layers(model: Any) -> list[Any]:
    return list(model.base_model.model.layers)


def _x(rows: int = 3) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(2))


def _alone(layer: Any, x: Tensor) -> Tensor:
    return rotate(layer.base_layer(x), *layer.rotations("default"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often rotations were made of parameters, and gradients of parameters."""
    count: Counter[str] = Counter()
    for name in ("from_parameters", "parameter_gradients"):
        function = getattr(parameters, name)

        def counted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            count[name] += 1
            return function(*arguments)

        monkeypatch.setattr(parameters, name, counted)
    return count


@pytest.mark.parametrize("num_layers", [1, 7])
def test_so_many_layers_cost_as_many_operations_as_one(num_layers: int, made: Counter[str]) -> None:
    model = _adapted(num_layers, group_size=4)
    model(_x()).sum().backward()
    assert made == {"from_parameters": 1, "parameter_gradients": 1}
    made.clear()
    with torch.no_grad():
        for _ in range(3):
            model(_x())
    assert made == {"from_parameters": 1}


@pytest.mark.parametrize("sizes", [{"group_size": 4}, {"stages": [2, 4]}], ids=str)
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_layers_that_take_no_part_get_no_gradient(variant: str, sizes: dict[str, Any]) -> None:
    """A gradient of zero would let weight decay and momentum move them."""
    model = _adapted(4, variant=variant, **sizes)
    model(_x(), used=2).sum().backward()
    found = [[store["default"].grad for store in (layer.road_theta, layer.road_alpha)] for layer in _layers(model)]
    assert all(gradient is not None and bool(gradient.any()) for layer in found[:2] for gradient in layer)
    assert all(gradient is None for layer in found[2:] for gradient in layer)


@torch.no_grad()
def test_what_no_version_counts_is_seen_layer_by_layer_and_call_by_call() -> None:
    """Layers are called by themselves, each after its own parameters were written past torch's count."""
    model = _adapted(3, group_size=4)
    model.requires_grad_(False)
    x = _x()
    model(x)
    for layer in _layers(model):
        layer.road_theta["default"].data += 0.3
        torch.testing.assert_close(layer(x), _alone(layer, x))
        layer.road_alpha["default"].data = layer.road_alpha["default"].data * 1.5
        torch.testing.assert_close(layer(x), _alone(layer, x))
    wanted = x
    for layer in _layers(model):
        wanted = _alone(layer, wanted).sin()
    torch.testing.assert_close(model(x), wanted)
    _layers(model)[1].road_theta["default"].data += 0.3
    assert not torch.equal(model(x), wanted)


@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_a_call_that_was_interrupted_leaves_nothing_behind(verb: str) -> None:
    config = roadie.RoadConfig(target_modules=["q_proj"], group_size=4, task_type="CAUSAL_LM")
    model = randomise(roadie.get_peft_model(tiny_llama(num_hidden_layers=2), config), seed=1).eval()
    model.requires_grad_(False)
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    call, ids = {"forward": model, "generate": model.generate}[verb], torch.ones(1, 3, dtype=torch.int64)
    x = torch.randn(2, first.in_features, generator=torch.Generator().manual_seed(2))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        handle = first.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(input_ids=ids)
        handle.remove()
        second.road_theta["default"].data += 0.3
        torch.testing.assert_close(second(x), _alone(second, x))


def test_unloading_takes_the_hooks_away() -> None:
    base = Net(2)
    config = roadie.RoadConfig(target_modules=r"layers\.\d+", group_size=4)
    unloaded = roadie.get_peft_model(base, config).unload()
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_always_called) for m in unloaded.modules()]
    assert not any(each for of_module in hooks for each in of_module)


def test_a_gradient_that_is_wanted_only_inside_of_the_model_is_not_lost() -> None:
    """The call begins without gradient, so that what was made for it has no graph."""
    model = _adapted(1, group_size=4)
    inner = model.base_model.model
    with torch.no_grad():
        inner.forward = lambda x: _with_gradient(inner, x)
        result = inner(_x())
    (gradient,) = torch.autograd.grad(result.sum(), _layers(model)[0].road_theta["default"])
    assert bool(gradient.any())


def _with_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return Net.forward(net, x)


def test_a_replica_of_data_parallel_trains_its_adapter() -> None:
    """Its parameters are plain attributes with a history, as torch.nn.parallel.replicate leaves them."""
    model = _adapted(2, group_size=4)
    wanted = torch.autograd.grad(model(_x()).sum(), [layer.road_theta["default"] for layer in _layers(model)])
    leaves = []
    for layer in _layers(model):
        leaves.append(layer.road_theta["default"])
        for store in (layer.road_theta, layer.road_alpha):
            copied = store._parameters.pop("default") * 1.0
            object.__setattr__(store, "default", copied)
    for got, gradient in zip(torch.autograd.grad(model(_x()).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, gradient)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_gets_ready_for_each_dtype_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer_calls = _adapted(1, group_size=4).eval(), []
    rotated = rotating.RoadLayer._rotated

    def counted(layer: Any, *given: Any) -> Tensor:
        layer_calls.append(layer)
        return rotated(layer, *given)

    monkeypatch.setattr(rotating.RoadLayer, "_rotated", counted)
    for _ in range(2):
        model(_x())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = [model(_x()) for _ in range(3)]
        wanted = _alone(_layers(model)[0], _x()).sin()
    assert all(torch.equal(each, wanted) for each in found)
    if not no_compiled_kernel() and prepare_rotation(_x(), roadie.identity(D, 4)) is not None:
        assert len(layer_calls) == (1 if dtype == torch.float32 else 2)


@torch.no_grad()
def test_what_a_bank_cannot_keep_is_made_once_a_call_too(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of adapters that are trained on a GPU, between steps of training."""
    model = _adapted(5, group_size=4)
    model.add_adapter("b", roadie.RoadConfig(target_modules=r"layers\.\d+", group_size=8))
    randomise(model, seed=3).double()
    names, x = ["default", "b", "__base__"], _x().double()
    wanted = model(x, adapter_names=names)
    for module in (residents, tables):
        monkeypatch.setattr(module, "can_be_stamped", lambda tensor: False)
    fresh = copy.deepcopy(model)
    made.clear()
    for call in range(1, 4):
        torch.testing.assert_close(fresh(x, adapter_names=names), wanted, rtol=0, atol=ORDER_OF_SUMS)
        assert made == {"from_parameters": 2 * call}  # of each group size


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"group_size": 4}, {"stages": [2, 8]}, {"variant": "road_4", "group_size": 4}], ids=str
)
def test_tables_that_cannot_be_watched_are_written_anew_where_they_are(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of what is trained on a GPU: each call has the values of now, and layers rotate as they did the last time."""
    model = _adapted(3, **settings).eval()
    monkeypatch.setattr(tables, "can_be_stamped", lambda tensor: False)
    places = []
    for _ in range(3):
        for layer in _layers(model):
            layer.road_theta["default"].data += 0.1
        wanted = _x()
        for layer in _layers(model):
            y = layer.base_layer(wanted)
            for rotation in layer.rotations("default"):
                y = rotate(y, rotation)
            wanted = y.sin()
        torch.testing.assert_close(model(_x()), wanted, rtol=0, atol=ORDER_OF_SUMS)
        places.append([table.direct.data_ptr() for made in _kept(model).of.values() for table in made.chain])
    assert places[0] == places[1] == places[2]


def _kept(model: Any) -> tables.Tables:
    return _layers(model)[0]._routing._kept._tables


def test_tables_that_a_graph_has_are_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without gradient may be part of one where some adapters are frozen: backward is as if nothing came after."""
    model = _adapted(2, group_size=4)
    monkeypatch.setattr(tables, "can_be_stamped", lambda tensor: False)
    frozen = _layers(model)[0]
    for parameter in (frozen.road_theta["default"], frozen.road_alpha["default"]):
        parameter.requires_grad_(False)
    x = _x().requires_grad_()
    inner = model.base_model.model
    inner.forward = lambda x: _with_gradient(inner, x)
    with torch.no_grad():
        result = inner(x)
    (wanted,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
    frozen.road_theta["default"].data += 0.5
    with torch.no_grad():
        inner(_x())
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], wanted)


@torch.no_grad()
def test_a_layer_by_itself_writes_its_tables_anew_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layers(_adapted(1, group_size=4))[0]
    monkeypatch.setattr(tables, "can_be_stamped", lambda tensor: False)
    for _ in range(4):
        layer.road_alpha["default"].data *= 1.1
        assert torch.equal(layer(_x()), _alone(layer, _x()))
