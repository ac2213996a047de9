"""add_weighted_adapter: against dense matrices, through files and stock PEFT; all of it or nothing."""

from __future__ import annotations

import peft
import pytest
import torch
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation
from torch import nn

import roadie
from roadie import checkpoint
from roadie.bank.live import live_adapter
from roadie.errors import AdapterError, ConfigError
from roadie.testing import stock_peft, tiny_llama
from roadie.testing.models import randomise
from roadie.testing.rival import is_stock
from roadie.tuner.weighted import CombinationType

KINDS = {
    "k": ("road_1", ["first", "second"]),
    "b": ("road_1", ["second"]),
    "c": ("road_2", ["first"]),
    "m": ("road_4", ["second"]),
}
SIZES = (6, 16, 8)
# float64 inside, stored in float32: angles of a few radians and entries of a few units are rounded once
ROUNDING = 8 * 2**-24


def chain(names="kbcm", seed=0, **settings):
    base, model = linear_chain(*SIZES), None
    for name in names:
        variant, targets = KINDS[name]
        config = roadie.RoadConfig(variant=variant, group_size=4, target_modules=targets, **settings)
        if model is None:
            model = roadie.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        randomise(model, seed=seed, scale=0.2, adapter=name)
    return model


def matrix(model: nn.Module, name: str, path: str) -> torch.Tensor:
    """R of a layer in float64, from first principles; the identity where the adapter has none."""
    layer = live_adapter(model, name).layers.get(path)
    if layer is None:
        return torch.eye(dict(zip(("first", "second"), SIZES[1:], strict=True))[path], dtype=torch.float64)
    return dense_rotation(layer.theta.double(), layer.alpha.double(), layer.variant.value, layer.group_size)


def log(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eig(matrix)
    return (vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)).real


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    return torch.linalg.matrix_exp(exponent * log(matrix))


def state(model: nn.Module) -> dict[str, object]:
    """Everything that adding an adapter may touch."""
    return {
        **{name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "configs": list(model.peft_config),
        "books": [(dict(m.variant), dict(m.group_size)) for m in model.modules() if hasattr(m, "road_theta")],
        "active": model.active_adapters,
    }


def assert_same_state(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert torch.equal(after[name][0], value[0])
            assert after[name][1] == value[1]
        else:
            assert after[name] == value


@pytest.mark.parametrize("names", ["kb", "bk", "cm", "kc", "kbcm"])
@pytest.mark.parametrize("how", [t.value for t in CombinationType])
def test_what_is_added_is_what_the_matrices_say(names, how):
    model = chain()
    weights = [0.75, 0.5, 1.25, 0.4][: len(names)]
    model.add_weighted_adapter(list(names), weights, "new", how)
    for path in ("first", "second"):
        parts = [matrix(model, name, path) for name in names]
        one = torch.eye(len(parts[0]), dtype=torch.float64)
        if how == "linear":
            wanted = one + sum(w * (R - one) for w, R in zip(weights, parts, strict=True))
        elif how == "compose":
            wanted = one
            for w, R in zip(weights, parts, strict=True):
                wanted = power(R, w) @ wanted
        else:
            logs = [w * log(R) for w, R in zip(weights, parts, strict=True)]
            if how == "mean":
                total = sum(map(torch.linalg.norm, logs)) / sum(weights)
                mean = sum(logs) / sum(weights)
                wanted = torch.linalg.matrix_exp(mean * total / mean.norm()) if mean.norm() > 1e-9 else one
            else:
                wanted = torch.linalg.matrix_exp(sum(logs))
        error = (matrix(model, "new", path) - wanted).abs().max()
        assert error <= ROUNDING * max(1.0, wanted.abs().max().item()), (path, error)


def test_the_default_is_a_blend_and_one_adapter_with_weight_1_is_its_copy():
    model = chain()
    model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "halved")
    model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "same", "blend")
    model.add_weighted_adapter(["m"], [1.0], "replica")
    model.add_weighted_adapter(["k"], [-1], "undone")
    for path in ("first", "second"):
        assert torch.equal(matrix(model, "halved", path), matrix(model, "same", path))
        product = matrix(model, "undone", path) @ matrix(model, "k", path)
        assert (product - torch.eye(len(product))).abs().max() <= 2 * ROUNDING
    replica, m = (live_adapter(model, name).layers for name in ("replica", "m"))
    assert list(replica) == ["second"] == list(m)
    assert replica["second"].variant == m["second"].variant == "road_4"
    assert torch.equal(replica["second"].theta, m["second"].theta)
    parameters = model.base_model._layers()[1].road_theta
    assert parameters["replica"].data_ptr() != parameters["m"].data_ptr()


def test_one_adapter_may_be_named_twice():
    model = chain()
    model.add_weighted_adapter(["k", "b", "k"], [0.5, 1.0, 0.5], "sandwich", "compose")
    for path in ("first", "second"):
        half = power(matrix(model, "k", path), 0.5)
        wanted = half @ matrix(model, "b", path) @ half
        assert (matrix(model, "sandwich", path) - wanted).abs().max() <= ROUNDING * wanted.abs().max()


def test_the_forward_is_the_product_of_both_and_the_others_stay():
    model, x = chain("kb"), torch.randn(3, 6)
    before, y = state(model), model(x)
    model.add_weighted_adapter(["k", "b"], [1.0, 1.0], "both", "compose")
    assert torch.equal(model(x), y), "the active adapter stays active"
    after = state(model)
    for name, value in before.items():
        if isinstance(value, tuple):
            assert torch.equal(after[name][0], value[0])
            assert after[name][1] == value[1], f"{name} is as trainable as before"
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    model.base_model.set_adapter(["k", "b"])
    expected = model(x)
    model.set_adapter("both")
    assert (model(x) - expected).abs().max() <= 16 * ROUNDING * expected.abs().max()


def test_adapters_in_training_go_on_training_beside_a_loaded_one(tmp_path):
    chain("k").save_pretrained(str(tmp_path))
    model = peft.PeftModel.from_pretrained(linear_chain(*SIZES), tmp_path / "k", adapter_name="k")
    model.add_adapter("b", roadie.RoadConfig(group_size=4, target_modules=["second"]))
    model.set_adapter("b")
    assert model.peft_config["k"].inference_mode
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["k", "b"], [1.0, 0.5], "new")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.active_adapter == "b"


def test_nothing_that_is_trained_is_frozen(tmp_path):
    """Neither beside an adapter loaded for inference, nor where adapters that are not active are trained."""
    chain("k").save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(linear_chain(*SIZES), tmp_path / "k", adapter_name="k")
    loaded.add_adapter("b", roadie.RoadConfig(group_size=4, target_modules=["second"]))
    loaded.set_adapter("b")
    both = chain("kb")
    for name, parameter in both.named_parameters():
        parameter.requires_grad_(".road_" in name)
    for model in (loaded, both):
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        model.add_weighted_adapter(["k"], [0.5], "new")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable != set()
        assert model.base_model._layers()[1].road_theta["new"].requires_grad is False


def test_the_result_trains():
    model = chain("kc")
    model.add_weighted_adapter(["k", "c"], [0.5, 0.5], "new")
    model.set_adapter("new")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters
    assert all(name.endswith(".new") for name in parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    rule = torch.optim.AdamW(parameters.values(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(torch.ones(2, 6)).square().sum()
        losses.append(loss.item())
        loss.backward()
        rule.step()
        rule.zero_grad()
    assert losses[-1] < losses[0]
    assert all((p != before[name]).any() for name, p in parameters.items())


@pytest.mark.parametrize("how", [t.value for t in CombinationType])
def test_the_result_is_saved_and_stock_peft_loads_it(how, tmp_path):
    config = roadie.RoadConfig(group_size=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = randomise(roadie.get_peft_model(tiny_llama(), config), adapter="default", scale=0.2)
    model.add_adapter("other", roadie.RoadConfig(variant="road_2", group_size=16, target_modules="all-linear"))
    randomise(model, adapter="other", scale=0.2)
    model.add_weighted_adapter(["default", "other"], [0.6, 0.5], "new", how)
    model.save_pretrained(str(tmp_path), selected_adapters=["new"])
    model.set_adapter("new")
    batch = torch.arange(3, 30).unsqueeze(0)
    with stock_peft():
        stock = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "new").eval()
        assert is_stock(stock)
    ours = roadie.PeftModel.from_pretrained(tiny_llama(), tmp_path / "new").eval()
    with torch.no_grad():
        expected = model.eval()(batch).logits
        assert torch.equal(ours(batch).logits, expected)
        assert torch.allclose(stock(batch).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        base = tiny_llama().eval()(batch).logits
        assert (expected - base).abs().max() > 0.01
    saved = checkpoint.load(tmp_path / "new")
    assert len(saved.layers) == 14
    assert saved.config["task_type"] == "CAUSAL_LM"


def test_group_sizes_by_layer_and_mixed_batches():
    settings = {"group_size": 4, "group_size_pattern": {"second": 8}}
    model = roadie.get_peft_model(
        linear_chain(*SIZES), roadie.RoadConfig(target_modules=["first", "second"], **settings)
    )
    model.add_adapter("other", roadie.RoadConfig(target_modules=["first", "second"], **settings))
    for name in ("default", "other"):
        randomise(model, adapter=name, seed=len(name), scale=0.2)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "new")
    assert [layer.group_size["new"] for layer in model.base_model._layers()] == [4, 8]
    x = torch.randn(2, 6)
    with torch.no_grad():
        mixed = model(x, adapter_names=["new", "default"])
        model.set_adapter("new")
        assert torch.allclose(mixed[0], model(x)[0], atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_held_in_the_dtype_of_the_others(base_dtype, autocast):
    base = linear_chain(*SIZES).to(base_dtype)
    dtype = torch.float32 if autocast and base_dtype is torch.bfloat16 else base_dtype
    config = roadie.RoadConfig(group_size=4, target_modules=["first"])
    model = roadie.get_peft_model(base, config, autocast_adapter_dtype=autocast)
    randomise(model, scale=0.2)
    model.add_weighted_adapter(["default"], [0.5], "halved")
    layer = model.base_model._layers()[0]
    assert layer.road_theta["halved"].dtype == layer.road_theta["default"].dtype == dtype
    wanted = layer.road_theta["default"].detach().double() / 2
    assert torch.allclose(layer.road_theta["halved"].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)


BAD = {
    "unknown": (["k", "x"], [1, 1], "new", "blend", "Adapter x does not exist", ConfigError),
    "none": ([], [], "new", "blend", r"Found no adapter matching the names in \[\]", ConfigError),
    "type": (
        ["k", "b"],
        [1, 1],
        "new",
        "svd",
        "Invalid combination_type: svd. Wanted one of blend, mean, compose, linear",
        ConfigError,
    ),
    "weights": (["k", "b"], [1], "new", "blend", r"got weights \[1.0\] for the adapters \['k', 'b'\]", ConfigError),
    "infinite": (["k", "b"], [1, float("inf")], "new", "blend", "wanted a finite number for each", ConfigError),
    "exists": (["k", "b"], [1, 1], "b", "blend", "got adapter_name='b', which the model has already", ConfigError),
    "reserved": (["k", "b"], [1, 1], "__base__", "blend", "which is reserved", ConfigError),
    "taken": (["k", "b"], [1, 1], "half", "blend", "which torch.nn.ParameterDict uses for itself", ConfigError),
    "a module": (["k", "b"], [1, 1], "first", "blend", "part of the module path", ConfigError),
    "negative mean": (["k", "b"], [1, -1], "new", "mean", "none negative", AdapterError),
    "too large": (["k", "b"], [1e40, 1e40], "new", "linear", "layer .*: got a result too large", AdapterError),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_with_nothing_changed(case):
    adapters, weights, name, how, said, error = BAD[case]
    model = chain()
    before = state(model)
    with pytest.raises(error, match=said) as raised:
        model.add_weighted_adapter(adapters, weights, name, how)
    assert isinstance(raised.value, ValueError)
    assert_same_state(model, before)


def test_a_result_too_large_for_half_precision_is_refused_with_nothing_changed():
    """Known only when the adapter is in the model already."""
    config = roadie.RoadConfig(group_size=4, target_modules=["first"])
    model = roadie.get_peft_model(linear_chain(*SIZES).to(torch.float16), config, autocast_adapter_dtype=False)
    randomise(model, scale=0.2)
    before = state(model)
    with pytest.raises(AdapterError, match=r"layer first: got a result too large for torch\.float16"):
        model.add_weighted_adapter(["default"], [1e6], "new", "linear")
    assert_same_state(model, before)


def test_blocks_without_a_logarithm_are_refused_but_for_linear():
    model = chain("kb")
    with torch.no_grad():
        model.base_model._layers()[1].road_alpha["b"][3] = -1.0
        model.base_model._layers()[1].road_theta["b"][3] = 0.3
    before = state(model)
    model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "fine", "linear")
    model.delete_adapter("fine")
    with torch.no_grad():
        model.base_model._layers()[1].road_alpha["b"][3] = 0.0
    for how in ("blend", "mean", "compose"):
        with pytest.raises(AdapterError, match=r"layer second: .*b"):
            model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "new", how)
    with torch.no_grad():
        model.base_model._layers()[1].road_alpha["b"][3] = -1.0
    assert_same_state(model, before)


def test_group_sizes_that_differ_are_refused():
    model = chain("k")
    model.add_adapter("wide", roadie.RoadConfig(group_size=8, target_modules=["second"]))
    randomise(model, adapter="wide")
    before = state(model)
    with pytest.raises(ConfigError, match=r"layer second: .*4.*8"):
        model.add_weighted_adapter(["k", "wide"], [0.5, 0.5], "new")
    assert_same_state(model, before)


def test_adapters_that_train_more_than_rotations_are_refused():
    saving = chain("b", modules_to_save=["first"])
    with pytest.raises(
        AdapterError, match=r"^Cannot add weighted adapters if they target the same module with modules_to_save"
    ):
        saving.add_weighted_adapter(["b"], [1.0], "new")
    biased = chain("b", bias="road_only")
    with pytest.raises(AdapterError, match="got 'b', which trains biases"):
        biased.add_weighted_adapter(["b"], [1.0], "new")
    assert list(saving.peft_config) == list(biased.peft_config) == ["b"]


def test_a_failure_on_the_way_in_leaves_the_model_as_it_was(monkeypatch):
    model = chain()
    before = state(model)
    layer = model.base_model._layers()[1]

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(layer, "update_layer", fails)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "new")
    assert_same_state(model, before)
    monkeypatch.undo()
    model.add_weighted_adapter(["k", "b"], [0.5, 0.5], "new")
