"""What PEFT's tuners do, RoAd does: several adapters, their life, whole modules trained along, copies, other ways in."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import roadie
from roadie.errors import CheckpointError, ConfigError
from roadie.testing import randomise, stock_peft, tiny_llama
from roadie.testing.accuracy import two_orders

IDS = torch.arange(3 * 6).reshape(3, 6) * 7 % 128
TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {"target_modules": TARGETS, "group_size": 16, "task_type": "CAUSAL_LM"}
# A logit ends a chain of sums: in each of two layers over 64 inputs, 6 tokens, 64, 64 and 128 inputs, then 64 of the head.
_APART = two_orders(2 * (64 + 6 + 64 + 64 + 128) + 64, torch.float32)
OF_SUMS = {"rtol": _APART, "atol": _APART}  # logits and what is summed up to them are of size 1 to 5
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _config(**settings: Any) -> roadie.RoadConfig:
    return roadie.RoadConfig(**{**SETTINGS, **settings})


def _model(*names: str, base: Any = None, **settings: Any) -> Any:
    """A tiny llama with adapters of these names, each with values of its own; the first one is active."""
    names = names or ("default",)
    model = roadie.get_peft_model(base or _llama(), _config(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, _config(**settings))
    for seed, name in enumerate(names):
        randomise(model, seed=seed, adapter=name)
    return model.eval()


def _llama(**settings: Any) -> Any:
    return tiny_llama(initializer_range=0.2, **settings)


def _logits(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def _layers(model: nn.Module) -> dict[str, roadie.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, roadie.Linear)}


def _rotated_by_hand(model: Any, *adapters: str) -> Any:
    """A plain llama whose weights are R W, with the dense R of the adapters, the first one applied first."""
    plain = copy.deepcopy(_llama()).double()
    for name, layer in _layers(model).items():
        linear = plain.get_submodule(name.removeprefix("base_model.model."))
        for adapter in adapters:
            if adapter in layer.road_theta:
                with torch.no_grad():
                    linear.weight.copy_(layer.get_delta_weight(adapter).double() @ linear.weight)
    return plain


# --- several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [["a"], ["b"], ["a", "b"], ["b", "a"], ["c", "a", "b"]])
def test_active_adapters_are_applied_in_order(active: list[str]) -> None:
    model = _model("a", "b", "c", variant="road_2")
    model.base_model.set_adapter(active)
    assert model.active_adapters == active
    wanted = _logits(_rotated_by_hand(model, *active))
    torch.testing.assert_close(_logits(model).double(), wanted, **OF_SUMS)
    if len(active) == 2:
        other = _logits(_rotated_by_hand(model, *reversed(active)))
        assert (other - wanted).abs().max() > 1e-2, "the order makes no difference: this test sees nothing"


def test_active_adapters_of_different_shapes_are_applied_in_order() -> None:
    model = _model("a", variant="road_4", group_size=16)
    model.add_adapter("b", _config(variant="road_2", group_size=4, target_modules=["q_proj", "k_proj"]))
    randomise(model, seed=5, adapter="b")
    for active in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(active)
        wanted = _logits(_rotated_by_hand(model, *active))
        torch.testing.assert_close(_logits(model).double(), wanted, **OF_SUMS)


def test_several_active_adapters_train_together() -> None:
    model = _model("a", "b")
    model.base_model.set_adapter(["a", "b"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".road_" in name}
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_setting_an_adapter_makes_it_alone_trainable() -> None:
    model = _model("a", "b")
    for name in ("b", "a"):
        model.set_adapter(name)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in model.named_parameters() if ".road_" in n and n.endswith("." + name)}
        assert model.active_adapters == [name]
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_unknown_adapter_is_refused() -> None:
    model = _model("a")
    with pytest.raises(ValueError, match="nothing"):
        model.set_adapter("nothing")
    assert model.active_adapters == ["a"]


def test_an_added_adapter_is_the_identity_and_changes_nothing_yet() -> None:
    model = _model("a")
    before = _logits(model)
    model.add_adapter("b", _config())
    assert torch.equal(_logits(model), before)
    model.set_adapter("b")
    assert torch.equal(_logits(model), _logits(_llama()))


def test_deleting_adapters() -> None:
    model = _model("a", "b", "c")
    wanted = {name: _logits(model, adapter_names=[name] * 3) for name in "abc"}
    model.delete_adapter("b")
    assert set(model.peft_config) == {"a", "c"}
    assert not any(n.endswith(".b") for n, _ in model.named_parameters())
    for layer in _layers(model).values():
        assert (
            set(layer.road_theta) == set(layer.road_alpha) == set(layer.variant) == set(layer.group_size) == {"a", "c"}
        )
    assert torch.equal(_logits(model, adapter_names=["a", "c", "a"])[1], wanted["c"][1])
    model.add_adapter("b", _config())
    assert torch.equal(_logits(model, adapter_names=["b"] * 3), _logits(_llama()))
    model.delete_adapter("a")
    assert model.active_adapters != ["a"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("a")


def test_disabling_gives_the_base_model_and_nests() -> None:
    model = _model("a")
    plain, adapted = _logits(_llama()), _logits(model)
    with model.disable_adapter():
        assert torch.equal(_logits(model), plain)
        assert torch.equal(model.generate(IDS, max_new_tokens=3), _llama().generate(IDS, max_new_tokens=3))
    assert torch.equal(_logits(model), adapted)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(_logits(model), adapted)


def test_disabling_merged_adapters_unmerges_them() -> None:
    model = _model("a")
    model.base_model.set_exact_unmerge("always")
    plain = _logits(_llama())
    model.merge_adapter()
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(_logits(model), plain)


def test_adapters_that_target_other_modules_leave_each_other_alone() -> None:
    model = _model("a")
    model.add_adapter("b", _config(target_modules=["up_proj", "q_proj"]))
    randomise(model, seed=3, adapter="b")
    for name in ("a", "b"):
        model.set_adapter(name)
        wanted = _logits(_rotated_by_hand(model, name))
        torch.testing.assert_close(_logits(model).double(), wanted, **OF_SUMS)


# --- merging into a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [None, ["b"], ["b", "a"]])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(adapters: list[str] | None, safe_merge: bool) -> None:
    model = _model("a", "b", variant="road_4")
    wanted = _logits(_rotated_by_hand(model, *(adapters or ["a"])))
    merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapters)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in _llama().named_modules()}
    assert merged.state_dict().keys() == _llama().state_dict().keys()
    torch.testing.assert_close(_logits(merged).double(), wanted, **OF_SUMS)


def test_unload_gives_the_base_model_bit_for_bit() -> None:
    base = _llama()
    wanted = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    unloaded = _model("a", "b", base=base).unload()
    assert not _layers(unloaded)
    assert unloaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unloaded.state_dict().items())


def test_a_merged_model_saves_and_loads_as_a_plain_one(tmp_path: Path) -> None:
    model = _model("a")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again), _logits(merged))


# --- modules trained whole ----------------------------------------------------------------------------------------


def _with_heads(*names: str) -> Any:
    model = _model(*names, modules_to_save=["lm_head"])
    heads = model.base_model.model.lm_head.modules_to_save
    with torch.no_grad():
        for index, name in enumerate(names):
            heads[name].weight.mul_(2.0 + index)
    return model


def test_modules_to_save_follow_their_adapter(tmp_path: Path) -> None:
    model = _with_heads("a", "b")
    wanted = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        wanted[name] = _logits(model)
        head = model.base_model.model.lm_head
        assert {n for n, p in head.named_parameters() if p.requires_grad} == {f"modules_to_save.{name}.weight"}
    assert not torch.equal(wanted["a"], wanted["b"])
    with model.disable_adapter():
        assert torch.equal(_logits(model), _logits(_llama()))
    model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(_llama(), tmp_path / "a", adapter_name="a").eval()
    again.load_adapter(tmp_path / "b", adapter_name="b")
    for name in ("a", "b"):
        again.set_adapter(name)
        assert torch.equal(_logits(again), wanted[name])
    assert torch.equal(
        _logits(again.merge_and_unload(adapter_names=["b"])), _logits(model.merge_and_unload(adapter_names=["b"]))
    )


# --- making, copying, loading -------------------------------------------------------------------------------------


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = _model("a", variant="road_2")
    model.save_pretrained(tmp_path)
    bare = roadie.get_peft_model(_llama(), _config(variant="road_2"), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in bare.named_parameters() if ".road_" in n} == {"meta"}
    again = roadie.PeftModel.from_pretrained(_llama(), tmp_path / "a", low_cpu_mem_usage=True).eval()
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    assert torch.equal(_logits(again), _logits(model))
    again.load_adapter(tmp_path / "a", adapter_name="b", low_cpu_mem_usage=True)
    assert torch.equal(_logits(again, adapter_names=["b"] * 3), _logits(model))


@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_independent(merged: bool) -> None:
    model = _model("a", "b")
    _logits(model)  # fills the caches
    wanted = _logits(model)
    if merged:
        model.merge_adapter()
    twin = copy.deepcopy(model)
    assert {id(layer._routing) for layer in _layers(twin).values()}.isdisjoint(
        {id(layer._routing) for layer in _layers(model).values()}
    )
    assert len({id(layer._routing) for layer in _layers(twin).values()}) == 1
    randomise(model, seed=9)
    if merged:
        model.unmerge_adapter()
        twin.unmerge_adapter()
    assert not torch.equal(_logits(model), wanted)
    torch.testing.assert_close(_logits(twin), wanted, **OF_SUMS)
    alone = {name: _logits(twin, adapter_names=[name] * 3) for name in ("a", "b")}
    assert torch.equal(_logits(twin, adapter_names=["b", "a", "b"])[0], alone["b"][0])


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickling(way: str) -> None:
    model = _model("a", "b")
    wanted = _logits(model, adapter_names=["b", "__base__", "a"])
    model.merge_adapter()
    merged = _logits(model)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert torch.equal(_logits(twin), merged)
    twin.base_model.unmerge_adapter()
    torch.testing.assert_close(_logits(twin, adapter_names=["b", "__base__", "a"]), wanted, **OF_SUMS)
    assert len({id(layer._routing) for layer in _layers(twin).values()}) == 1


def test_a_copied_layer_does_not_listen_to_the_rows_of_the_original() -> None:
    model = _model("a", "b")
    layer = _layers(model)["base_model.model." + Q_PROJ]
    with roadie.rows(model, ["a", "b"]):
        twin = copy.deepcopy(layer)
        assert twin(torch.ones(5, 64)).shape == (5, 64)


# --- transformers' own methods ------------------------------------------------------------------------------------


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    base = _llama().eval()
    plain = _logits(base)
    base.add_adapter(_config(), adapter_name="a")
    assert len(_layers(base)) == 6
    randomise(base, adapter="a")
    adapted = _logits(base)
    assert not torch.equal(adapted, plain)
    base.disable_adapters()
    assert torch.equal(_logits(base), plain)
    base.enable_adapters()
    assert torch.equal(_logits(base), adapted)
    base.add_adapter(_config(), adapter_name="b")
    base.set_adapter("b")
    assert torch.equal(_logits(base), plain)
    base.set_adapter("a")
    base.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = _llama().eval()
    again.load_adapter(str(tmp_path), adapter_name="loaded")
    assert len(_layers(again)) == 6
    assert torch.equal(_logits(again), adapted)
    base.delete_adapter("b")
    assert all("b" not in layer.road_theta for layer in _layers(base).values())


def test_rows_on_a_model_with_transformers_own_adapters() -> None:
    base = _llama().eval()
    plain = _logits(base)
    for seed, name in enumerate(("a", "b")):
        base.add_adapter(_config(), adapter_name=name)
        randomise(base, seed=seed, adapter=name)
    alone = {}
    for name in ("a", "b"):
        base.set_adapter(name)
        alone[name] = _logits(base)
    with roadie.rows(base, ["b", "__base__", "a"]):
        got = _logits(base)
    assert torch.equal(got, torch.stack([alone["b"][0], plain[1], alone["a"][2]]))


def test_auto_model_of_transformers_loads_an_adapter_folder(tmp_path: Path) -> None:
    base = _llama()
    base.save_pretrained(tmp_path / "base")
    model = _model("default", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert _layers(loaded)
    assert torch.equal(_logits(loaded), _logits(model))


def test_auto_peft_model(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path / "base")
    model = _model("default", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.base_model, roadie.RoadModel)
    assert torch.equal(_logits(loaded), _logits(model))


def test_inject_adapter_in_model() -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32))
    plain = copy.deepcopy(base)
    config = roadie.RoadConfig(target_modules=["2"], group_size=8)
    model = inject_adapter_in_model(config, base, adapter_name="x")
    assert model is base
    assert list(_layers(model)) == ["2"]
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x))
    randomise(model)
    wanted = plain(x) @ model[2].get_delta_weight("x").T
    torch.testing.assert_close(model(x), wanted)
    state = get_peft_model_state_dict(model, adapter_name="x")
    assert set(state) == {"2.road_theta", "2.road_alpha"}
    with roadie.rows(model, ["x", "__base__", "x"]):
        torch.testing.assert_close(model(x), torch.stack([wanted[0], plain(x)[1], wanted[2]]))


def test_injection_that_follows_a_state_dict() -> None:
    source = _model("default", target_modules=["q_proj"], layers_to_transform=[1])
    state = get_peft_model_state_dict(source)
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    model = inject_adapter_in_model(_config(), _llama(), state_dict=bare)
    assert list(_layers(model)) == ["model.layers.1.self_attn.q_proj"]


# --- registration -------------------------------------------------------------------------------------------------


def test_peft_uses_roadie_after_register_and_its_own_after_unregister(tmp_path: Path) -> None:
    _model("default").save_pretrained(tmp_path)
    assert isinstance(peft.PeftModel.from_pretrained(_llama(), tmp_path).base_model, roadie.RoadModel)
    roadie.unregister()
    stock = peft.PeftModel.from_pretrained(_llama(), tmp_path)
    assert type(stock.base_model).__module__ == "peft.tuners.road.model"
    ours = roadie.PeftModel.from_pretrained(_llama(), tmp_path)
    assert isinstance(ours.base_model, roadie.RoadModel)
    torch.testing.assert_close(_logits(ours.eval()), _logits(stock.eval()))
    roadie.unregister()
    roadie.register()
    assert isinstance(peft.PeftModel.from_pretrained(_llama(), tmp_path).base_model, roadie.RoadModel)


def test_a_config_of_stock_peft_reaches_our_tuner() -> None:
    with stock_peft() as stock_config:
        config = stock_config(target_modules=TARGETS, group_size=16, variant="road_2")
    assert type(config).__module__.startswith("peft.tuners.road")
    model = roadie.get_peft_model(_llama(), config)
    assert isinstance(model.base_model, roadie.RoadModel)
    assert len(_layers(randomise(model))) == 6
    model.add_adapter("second", config)
    assert torch.equal(_logits(model.eval(), adapter_names=["second"] * 3), _logits(_llama()))


# --- beside other tuners ------------------------------------------------------------------------------------------


def test_a_mixed_model_is_refused_as_stock_peft_refuses_it(portrait: Callable[..., Any]) -> None:
    """PEFT's PeftMixedModel has a fixed list of tuners without ROAD; changing that list would be patching PEFT."""
    base = _llama()
    before = portrait(base)
    with stock_peft() as stock_config, pytest.raises(ValueError, match="'ROAD' is not compatible"):
        peft.get_peft_model(_llama(), stock_config(**SETTINGS), mixed=True)
    with pytest.raises(ValueError, match="'ROAD' is not compatible"):
        roadie.get_peft_model(base, _config(), mixed=True)
    mixed = peft.get_peft_model(_llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="'ROAD' is not compatible"):
        mixed.add_adapter("road", _config())
    assert portrait(base) == before


def test_a_model_with_a_road_adapter_over_a_merged_lora_one() -> None:
    lora = peft.get_peft_model(_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wanted = _logits(lora.eval())
    model = roadie.get_peft_model(lora.merge_and_unload(), _config()).eval()
    torch.testing.assert_close(_logits(model), wanted, **OF_SUMS)
    randomise(model)
    adapted = _logits(model)
    torch.testing.assert_close(_logits(model.merge_and_unload()), adapted, rtol=1e-3, atol=1e-4)


# --- hot swap -----------------------------------------------------------------------------------------------------


def test_state_dicts_go_in_and_out() -> None:
    model, other = _model("default"), _model("default")
    randomise(other, seed=4)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(other).items()}
    assert set(state) == {
        f"base_model.model.model.layers.{layer}.{name}.road_{part}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for part in ("theta", "alpha")
    }
    before = _logits(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), _logits(other))


@pytest.mark.parametrize("fault", ["shape", "nan", "inf"])
def test_a_bad_state_dict_leaves_the_values_untouched(fault: str, portrait: Callable[..., Any]) -> None:
    model = _model("default", "b")
    state = {name: tensor.clone() + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    last = sorted(state)[-1]  # noqa: FURB192
    if fault == "shape":
        state[last] = state[last][:-2]
    else:
        state[last][0] = float(fault)
    before, logits = portrait(model), _logits(model)
    with pytest.raises(CheckpointError, match="shape" if fault == "shape" else "non-finite"):
        set_peft_model_state_dict(model, state)
    assert portrait(model) == before
    assert torch.equal(_logits(model), logits)


# --- settings of the config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "road_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    base = _llama(attention_bias=True)
    model = roadie.get_peft_model(base, _config(bias=bias, target_modules=["q_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 8
    wanted = {"none": set(), "all": biases, "road_only": {name for name in biases if "q_proj" in name}}[bias]
    assert trained == wanted
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.3)
    randomise(model).eval()
    logits = _logits(model)
    model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(_llama(attention_bias=True), tmp_path).eval()
    assert torch.equal(_logits(again), logits)


def test_trained_tokens(tmp_path: Path) -> None:
    model = _model("default", trainable_token_indices=[0, 7, 14])
    tokens = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert [p.shape for p in tokens.values()] == [(3, 64)]
    with torch.no_grad():
        for parameter in tokens.values():
            parameter.add_(1)
    logits = _logits(model)
    model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(_llama(), tmp_path).eval()
    assert torch.equal(_logits(again), logits)
    merged = model.merge_and_unload()
    assert type(merged.get_input_embeddings()) is nn.Embedding
    torch.testing.assert_close(_logits(merged), logits, **OF_SUMS)


class _Headed(nn.Module):
    """A model whose head is a module without a weight of its own, as classification heads are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = _Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.dense(x)))


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_a_whole_module_without_a_weight_of_its_own_is_unloaded(unload: str) -> None:
    torch.manual_seed(0)
    config = roadie.RoadConfig(target_modules=["body"], modules_to_save=["head"], group_size=8)
    model = roadie.get_peft_model(_Headed(), config).eval()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].out.weight.add_(1)
    randomise(model)
    x = torch.randn(3, 8)
    with torch.no_grad():
        plain, head = model.base_model.model.body.get_base_layer()(x), model.base_model.model.head
        wanted = model(x) if unload == "merge_and_unload" else head(plain)  # PEFT keeps the trained copy either way
        unloaded = getattr(model, unload)()
        assert type(unloaded.head) is _Head
        torch.testing.assert_close(unloaded(x), wanted)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"1.self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"0.self_attn.q_proj"},
        ),
        ({"target_modules": r".*\.1\..*k_proj"}, {"1.self_attn.k_proj"}),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["q_proj"]},
            {"0.self_attn.k_proj", "1.self_attn.k_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"1.self_attn.q_proj"}),
        ({"target_modules": None}, {f"{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
            {"1.self_attn.v_proj"},
        ),
        (
            {"target_modules": "all-linear", "layers_to_transform": [1]},
            {*(f"1.self_attn.{n}_proj" for n in "qkvo"), *(f"1.mlp.{n}_proj" for n in ("gate", "up", "down"))},
        ),
    ],
)
def test_which_modules_are_adapted(settings: dict[str, Any], wanted: set[str]) -> None:
    model = roadie.get_peft_model(_llama(), _config(**settings))
    assert {name.removeprefix("base_model.model.model.layers.") for name in _layers(model)} == wanted


def test_variants_and_group_sizes_by_pattern(tmp_path: Path) -> None:
    model = _model(
        "default",
        variant_pattern={r"layers\.1\..*": "road_4", "down_proj": "road_2"},
        group_size_pattern={"q_proj": 4, r"layers\.1\..*": 8},
    )
    got = {
        name.removeprefix("base_model.model.model.layers."): (layer.variant["default"], layer.group_size["default"])
        for name, layer in _layers(model).items()
    }
    assert got == {
        "0.self_attn.q_proj": ("road_1", 4),
        "0.self_attn.v_proj": ("road_1", 16),
        "0.mlp.down_proj": ("road_2", 16),
        "1.self_attn.q_proj": ("road_4", 4),
        "1.self_attn.v_proj": ("road_4", 8),
        "1.mlp.down_proj": ("road_4", 8),
    }
    torch.testing.assert_close(_logits(model).double(), _logits(_rotated_by_hand(model, "default")), **OF_SUMS)
    model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(_llama(), tmp_path).eval()
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize("key", ["variant_pattern", "group_size_pattern"])
def test_patterns_that_match_nothing_are_warned_of(key: str) -> None:
    value = "road_2" if key == "variant_pattern" else 4
    with pytest.warns(RuntimeWarning, match=rf"{key} keys did not match .*: \['layers'\]"):
        roadie.get_peft_model(_llama(), _config(**{key: {"layers": value, "q_proj": value}}))


def test_a_group_size_that_does_not_divide_is_adapted_only_on_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"48.*Module: .*adapt_group_size=True"):
        roadie.get_peft_model(_llama(), _config(group_size=48))
    odd = nn.Sequential(nn.Linear(8, 1))
    with pytest.raises(ConfigError, match=r"cannot be paired.*leave it out with exclude_modules\.(\n|$)"):
        roadie.get_peft_model(odd, roadie.RoadConfig(target_modules=["0"], group_size=8))
    model = _model("default", group_size=48, adapt_group_size=True)
    assert {layer.group_size["default"] for layer in _layers(model).values()} == {16}
    logits = _logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(roadie.PeftModel.from_pretrained(_llama(), tmp_path).eval()), logits)


def test_the_adapter_dtype_follows_autocast_adapter_dtype() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = roadie.get_peft_model(_llama(dtype=torch.bfloat16), _config(), autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if ".road_" in n} == {dtype}
        assert _logits(model).dtype == torch.bfloat16
