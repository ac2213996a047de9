"""Adapter files against stock PEFT: what it saves we load, what we save it loads, bit for bit."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters
from roadie.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from roadie.rotation import Variant, parameter_size, rotate
from roadie.testing import stock_peft, tiny_llama

VARIANTS = tuple(variant.value for variant in Variant)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGETS = {"layers.0.q": 128, "layers.0.v": 64, "layers.1.q": 128, "layers.1.v": 64}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(8, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.v(self.q(x))[..., :8]


class Tiny(nn.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return Tiny().to(dtype)


@pytest.fixture(autouse=True)
def stock():
    """PEFT's own RoadConfig; every model of this module is PEFT's own."""
    with stock_peft() as config:
        assert config.__module__ == "peft.tuners.road.config"
        yield config


def road_layers(model):
    """Module path -> PEFT's own layer."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "road_theta")
    }
    assert layers
    assert all(type(module).__module__.startswith("peft.tuners.road") for module in layers.values())
    return layers


def assert_same_bits(model, adapter, name="default"):
    layers = road_layers(model)
    assert set(adapter.layers) == set(layers)
    for path, ours in adapter.layers.items():
        theirs = layers[path]
        assert (ours.variant.value, ours.group_size) == (theirs.variant[name], theirs.group_size[name])
        assert ours.out_features == theirs.out_features
        for mine, reference in ((ours.theta, theirs.road_theta[name]), (ours.alpha, theirs.road_alpha[name])):
            assert mine.dtype == reference.dtype
            assert torch.equal(mine.view(torch.uint8), reference.data.view(torch.uint8))


def stock_adapter(config, dtype=torch.float32, model=None, **settings):
    torch.manual_seed(1)
    settings = {"target_modules": ["q", "v"], "init_weights": False, **settings}
    return peft.get_peft_model(model or tiny(dtype), config(**settings), autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [2, 4, 16, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stock_saves_we_load_and_save_again_byte_for_byte(variant, group_size, dtype, stock, tmp_path):
    model = stock_adapter(stock, dtype, variant=variant, group_size=group_size)
    model.save_pretrained(tmp_path / "stock")
    adapter = checkpoint.load(tmp_path / "stock")
    assert_same_bits(model, adapter)
    assert next(iter(adapter.layers.values())).theta.dtype == dtype
    checkpoint.save(adapter, tmp_path / "ours")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [2, 4, 16, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_save_stock_loads(variant, group_size, dtype, stock, tmp_path):
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for path, out_features in TARGETS.items():
        size = parameter_size(variant, out_features)
        theta, alpha = torch.randn(2, size, generator=generator).to(dtype).unbind()
        layers[path] = LayerParameters(theta, alpha, variant, group_size)
    config = {"variant": variant, "group_size": group_size, "target_modules": ["q", "v"], "peft_type": "ROAD"}
    adapter = Adapter(layers, config)
    checkpoint.save(adapter, tmp_path)
    model = peft.PeftModel.from_pretrained(tiny(dtype), str(tmp_path), autocast_adapter_dtype=False)
    assert type(model.peft_config["default"]) is stock
    assert_same_bits(model, adapter)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_adapter_computes_what_stock_computes(variant, stock, tmp_path):
    model = stock_adapter(stock, torch.float64, variant=variant, group_size=16).eval()
    model.save_pretrained(tmp_path)
    adapter = checkpoint.load(tmp_path)
    x = torch.randn(3, 8, dtype=torch.float64)
    layer = road_layers(model)["layers.1.q"]
    ours = rotate(layer.base_layer(x), adapter.layers["layers.1.q"].rotation)
    torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)


def test_other_tensors_go_both_ways(stock, tmp_path):
    model = stock_adapter(stock, torch.bfloat16, modules_to_save=["head"], group_size=4)
    saved = model.base_model.model.head.modules_to_save["default"]
    with torch.no_grad():
        saved.weight.copy_(torch.randn(3, 8))
    model.save_pretrained(tmp_path / "stock")
    adapter = checkpoint.load(tmp_path / "stock")
    assert set(adapter.other) == {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert torch.equal(adapter.other["base_model.model.head.weight"], saved.weight)
    checkpoint.save(adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(torch.bfloat16), str(tmp_path / "ours"), autocast_adapter_dtype=False)
    assert_same_bits(again, adapter)
    assert torch.equal(again.base_model.model.head.modules_to_save["default"].weight, saved.weight)


def test_each_of_several_adapters_has_its_folder(stock, tmp_path):
    model = stock_adapter(stock, group_size=4)
    model.add_adapter("other", stock(variant="road_2", group_size=2, target_modules=["v"], init_weights=False))
    model.save_pretrained(tmp_path)
    other = checkpoint.load(tmp_path / "other")
    layers = {path: layer for path, layer in road_layers(model).items() if path.endswith("v")}
    assert set(other.layers) == set(layers)
    for path, ours in other.layers.items():
        assert torch.equal(ours.theta, layers[path].road_theta["other"])
        assert torch.equal(ours.alpha, layers[path].road_alpha["other"])
    assert_same_bits(model, checkpoint.load(tmp_path))


def test_a_language_model_goes_through_peft_and_through_transformers(stock, tmp_path):
    settings = {"group_size": 16, "init_weights": False, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_llama(), stock(**settings))
    model.save_pretrained(tmp_path / "peft")
    adapter = checkpoint.load(tmp_path / "peft")
    assert_same_bits(model, adapter)
    assert len(adapter.layers) == 14

    native = tiny_llama()
    native.load_adapter(str(tmp_path / "peft"))
    native.save_pretrained(tmp_path / "transformers")
    through = checkpoint.load(tmp_path / "transformers")
    assert set(through.layers) == set(adapter.layers)
    for path, ours in through.layers.items():
        assert torch.equal(ours.theta, adapter.layers[path].theta)
        assert torch.equal(ours.alpha, adapter.layers[path].alpha)


EXTRAS = {
    "adapt_group_size": True,
    "bias": "road_only",
    "exclude_modules": ["v"],
    "group_size_pattern": {"nothing": 2},
    "input_stages": [4],
    "input_stages_pattern": {"nothing": [2, 4]},
    "layers_pattern": "layers",
    "layers_to_transform": 0,
    "stages": [4],
    "stages_pattern": {"nothing": [2, 4]},
    "target_experts": "each",
    "target_towers": True,
    "trainable_token_indices": [3],
    "variant_pattern": {"nothing": "road_2"},
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.filterwarnings("ignore:this adapter has")
@pytest.mark.parametrize("key", sorted(checkpoint.EXTRA_DEFAULTS))
def test_stock_refuses_a_config_it_would_misread(key, stock, tmp_path):
    model = stock_adapter(stock, group_size=4)
    model.save_pretrained(tmp_path)
    plain = checkpoint.load(tmp_path)
    inputs = {path + INPUT_SUFFIX: layer for path, layer in plain.layers.items()} if key == "input_stages" else {}
    if key == "target_experts":
        inputs = {"layers.0.experts.road_down": plain.layers["layers.0.q"]}
    checkpoint.save(Adapter({**plain.layers, **inputs}, {**plain.config, key: EXTRAS[key]}), tmp_path)
    assert checkpoint.load(tmp_path).config[key] == EXTRAS[key]
    base = tiny()
    before = copy.deepcopy(base.state_dict())
    kind = (
        "-experts" if key == "target_experts" else "-inputs" if "input" in key else "-stages" if "stages" in key else ""
    )
    with pytest.raises(ValueError, match=f"Invalid variant roadie{kind}:road_1"):
        peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_stock_refuses_what_a_crash_in_the_middle_of_a_save_leaves(stock, tmp_path):
    # The config is the first file that is moved out and the last that is moved in.
    stock_adapter(stock, group_size=4).save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG_NAME}'"):
        peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
