"""Whole adapters composed, inverted, strengthened and blended: layer by layer, on disk, and in PEFT's own RoAd."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.adapter_algebra import blend_adapters, compose_adapters, inverse, power
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant, parameter_size
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

VARIANTS = tuple(variant.value for variant in Variant)
WIDTHS = {"first": 16, "second": 24, "third": 8}


def make(variant="road_1", group_size=4, layers=WIDTHS, seed=0, dtype=torch.float64, spread=0.3, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for path in layers:
        size = parameter_size(variant, WIDTHS[path])
        theta, alpha = torch.randn(2, size, generator=generator, dtype=torch.float64) * spread
        parameters[path] = LayerParameters(theta.to(dtype), (1 + 0.3 * alpha).to(dtype), variant, group_size)
    settings = {"peft_type": "ROAD", "variant": variant, "group_size": group_size, "target_modules": [*layers]}
    return Adapter(parameters, {**settings, **config})


def matrix(adapter: Adapter, path: str) -> torch.Tensor:
    """R of a layer, from first principles; the identity where the adapter has none."""
    if path not in adapter.layers:
        return torch.eye(WIDTHS[path], dtype=torch.float64)
    layer = adapter.layers[path]
    return dense_rotation(layer.theta, layer.alpha, layer.variant.value, layer.group_size)


def assert_equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    # Condition numbers of a few units, angles of a few radians, a dozen roundings.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variants", [(a, b) for a in VARIANTS for b in VARIANTS], ids="-".join)
@pytest.mark.parametrize("group_size", [2, 8])
def test_composing_is_a_product_in_every_layer(variants, group_size) -> None:
    outer, inner = (make(variant, group_size, seed=seed) for seed, variant in enumerate(variants))
    result = compose_adapters(outer=outer, inner=inner)
    assert result.variants == ((Variant.ROAD_1,) if variants == ("road_1", "road_1") else (Variant.ROAD_2,))
    for path in WIDTHS:
        assert_equal(matrix(result, path), matrix(outer, path) @ matrix(inner, path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_powers_and_inverses_of_adapters(variant) -> None:
    adapter = make(variant)
    half = power(adapter, 0.5)
    for path in WIDTHS:
        assert_equal(matrix(half, path) @ matrix(half, path), matrix(adapter, path))
        assert_equal(matrix(inverse(adapter), path), torch.linalg.inv(matrix(adapter, path)))
        assert_equal(matrix(power(adapter, 3), path), torch.linalg.matrix_power(matrix(adapter, path), 3))
        assert_equal(matrix(power(adapter, 0), path), torch.eye(WIDTHS[path], dtype=torch.float64))
    assert power(adapter, 1) is adapter


@pytest.mark.parametrize("variants", [("road_1", "road_1"), ("road_2", "road_4"), ("road_1", "road_2")], ids="-".join)
def test_blends_of_adapters_are_those_of_their_layers(variants) -> None:
    first, second = (make(variant, seed=seed) for seed, variant in enumerate(variants))
    result = blend_adapters([first, second], [0.75, -0.5])
    there = blend_adapters([second, first], [-0.5, 0.75])
    back = compose_adapters(blend_adapters([first, second], [-0.75, 0.5]), result)
    for path in WIDTHS:
        assert_equal(matrix(result, path), matrix(there, path))
        assert_equal(matrix(back, path), torch.eye(WIDTHS[path], dtype=torch.float64))
    assert blend_adapters([first, second], [0.0, 1.0]) is second
    assert dict(blend_adapters([first, second], [0, 0]).out_features) == WIDTHS
    assert_equal(matrix(blend_adapters([first, second], [0, 0]), "third"), torch.eye(8, dtype=torch.float64))


def test_blends_of_road_1_are_the_closed_form_in_the_parameters() -> None:
    first, second = make(seed=0), make(seed=1)
    result = blend_adapters([first, second], [0.5, 2])
    for path, layer in result.layers.items():
        one, two = first.layers[path], second.layers[path]
        assert layer.variant is Variant.ROAD_1
        assert_equal(layer.theta, 0.5 * one.theta + 2 * two.theta)
        assert_equal(layer.alpha, one.alpha**0.5 * two.alpha**2)


def test_a_layer_that_an_adapter_does_not_have_is_the_identity_there() -> None:
    first, second = make("road_2", layers=["first", "second"]), make("road_2", layers=["third", "second"], seed=1)
    composed, blended = compose_adapters(first, second), blend_adapters([first, second], [0.5, 2])
    for path in WIDTHS:
        assert_equal(matrix(composed, path), matrix(first, path) @ matrix(second, path))
    assert_equal(matrix(blended, "third"), matrix(second, "third") @ matrix(second, "third"))
    assert_equal(matrix(blended, "first") @ matrix(blended, "first"), matrix(first, "first"))
    assert composed.config["target_modules"] == sorted(WIDTHS)
    alike = [make(layers=[path], target_modules="all-linear") for path in ("second", "first")]
    assert compose_adapters(*alike).config["target_modules"] == ["first", "second"]
    assert power(alike[0], 2).config["target_modules"] == "all-linear"


def test_modules_are_named_where_the_configs_choose_them_in_different_ways() -> None:
    layers = ["second", "first"]
    for one, two in (
        ({"target_modules": "all-linear", "exclude_modules": ["third"]}, {"target_modules": "all-linear"}),
        ({"target_modules": layers}, {"target_modules": [*layers, "not in this model"]}),
    ):
        config = compose_adapters(make(layers=layers, **one), make(layers=layers, **two)).config
        assert config["target_modules"] == ["first", "second"]
        assert "exclude_modules" not in config


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [((16, 16), torch.float32), ((32, 16), torch.float32), ((16, 64), torch.float64), ((64, 64), torch.float64)],
)
def test_results_are_stored_in_float32_or_wider(dtypes, wanted) -> None:
    kinds = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    first, second = (make(seed=seed, dtype=kinds[bits]) for seed, bits in enumerate(dtypes))
    result = compose_adapters(first, second)
    assert {layer.theta.dtype for layer in result.layers.values()} == {wanted}
    exact = matrix(first, "first") @ matrix(second, "first")
    # The angle and the logarithm of alpha are rounded: by at most 1.5 u and 1 u here.
    bound = 4 * torch.finfo(wanted).eps * exact.abs().max().item()
    torch.testing.assert_close(matrix(result, "first"), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("variants", [("road_1", "road_1"), ("road_2", "road_1"), ("road_4", "road_4")], ids="-".join)
def test_what_comes_out_is_saved_loaded_and_computed_by_stock_peft(variants, tmp_path) -> None:
    """PEFT's own RoAd with the composed adapter does what two of its models with one adapter each do, one after the other."""
    first = make(variants[0], layers=["first", "third"], seed=0)
    second = make(variants[1], layers=["first", "second"], seed=1)
    for name, adapter in {
        "both": compose_adapters(outer=second, inner=first),
        "mixed": blend_adapters([first, second], [0.5, 0.25]),
        "undone": inverse(first),
    }.items():
        checkpoint.save(adapter, tmp_path / name)
        again = checkpoint.load(tmp_path / name)
        assert dict(again.config) == dict(adapter.config)
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        plain = linear_chain(12, 16, 24, 8, dtype=torch.float64)
        for path, width in WIDTHS.items():
            assert torch.equal(matrix(again, path), matrix(adapter, path)), width
        with stock_peft():
            model = peft.PeftModel.from_pretrained(
                linear_chain(12, 16, 24, 8, dtype=torch.float64), str(tmp_path / name), autocast_adapter_dtype=False
            )
            assert is_stock(model)
            got = model(x)
        for path, layer in plain.named_children():
            x = layer(x) @ expected(name, first, second, path).mT
        torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def expected(name: str, first: Adapter, second: Adapter, path: str) -> torch.Tensor:
    """What each layer's output is to be multiplied by, in dense matrices."""
    one, two = matrix(first, path), matrix(second, path)
    if name == "both":
        return two @ one
    if name == "undone":
        return torch.linalg.inv(one)
    return torch.linalg.matrix_exp(0.5 * dense_logarithm(one) + 0.25 * dense_logarithm(two))


def dense_logarithm(dense: torch.Tensor) -> torch.Tensor:
    """By eigenvectors: good for the distinct eigenvalues of random blocks, and for the identity."""
    if torch.equal(dense, torch.eye(len(dense), dtype=dense.dtype)):
        return torch.zeros_like(dense)
    values, vectors = torch.linalg.eig(dense)
    return (vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)).real


def test_configs_keep_what_they_say_alike() -> None:
    shared = {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM", "unknown": [1, 2], "bias": "none"}
    first = make(**shared, revision="a", init_weights=True, target_modules=["second", "third", "first"])
    second = make("road_2", seed=1, **shared, revision="b", target_modules={"third", "first", "second"})
    config = compose_adapters(first, second).config
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["task_type"], config["unknown"], config["variant"]) == ("CAUSAL_LM", [1, 2], "road_2")
    assert config["target_modules"] == ["second", "third", "first"]
    assert not {"revision", "init_weights", "bias"} & set(config)
    assert power(make(exclude_modules=["lm_head"]), 2).config["exclude_modules"] == ["lm_head"]
    other_model = make(**{**shared, "base_model_name_or_path": "another/model"})
    assert "base_model_name_or_path" not in compose_adapters(first, other_model).config


def test_every_layer_keeps_its_group_size(tmp_path) -> None:
    small, large = make(group_size=2, layers=["first"]), make(group_size=8, layers=["second", "third"])
    result = compose_adapters(small, large)
    assert {path: layer.group_size for path, layer in result.layers.items()} == {"first": 2, "second": 8, "third": 8}
    checkpoint.save(result, tmp_path)
    assert checkpoint.load(tmp_path).group_sizes == (2, 8)
    assert dict(power(make(group_size=8), 2).config)["group_size"] == 8
    nothing_said = Adapter(make(group_size=2).layers)
    checkpoint.save(inverse(nothing_said), tmp_path)
    assert checkpoint.load(tmp_path).group_sizes == (2,)


def test_paths_that_end_in_one_another_keep_their_group_sizes(tmp_path) -> None:
    def layer(group_size):
        return LayerParameters(torch.zeros(8), torch.ones(8), "road_1", group_size)

    adapter = Adapter({"x": layer(2), "a.x": layer(4), "b.a.x": layer(2), "aox": layer(2)})
    checkpoint.save(power(adapter, 2), tmp_path)
    sizes = {path: layer.group_size for path, layer in checkpoint.load(tmp_path).layers.items()}
    assert sizes == {"x": 2, "a.x": 4, "b.a.x": 2, "aox": 2}


def with_block(adapter: Adapter, path: str, theta: float, alpha: float) -> Adapter:
    """The same road_2 adapter with one row changed: that of output 3."""
    layer = adapter.layers[path]
    changed = {"theta": layer.theta.clone(), "alpha": layer.alpha.clone()}
    changed["theta"][3], changed["alpha"][3] = theta, alpha
    return Adapter({**adapter.layers, path: LayerParameters(**changed, variant="road_2", group_size=layer.group_size)})


def test_refusals_name_adapter_layer_and_outputs() -> None:
    good = make("road_2", spread=0.1)
    mirrored, singular = with_block(good, "second", math.pi, 1.0), with_block(good, "second", 0.0, 0.0)
    with pytest.raises(AdapterError, match=r"layer second: terse: got a block .*outputs 1 and 3: mirrored"):
        blend_adapters([good, mirrored], [0.5, 0.5], names=["legal", "terse"])
    with pytest.raises(AdapterError, match=r"layer second: adapter 1 of 2: got .*outputs 1 and 3: mirrored"):
        blend_adapters([good, mirrored], [0.0, 0.5])
    with pytest.raises(AdapterError, match=r"layer second: the adapter: got .*outputs 1 and 3: mirrored"):
        power(mirrored, 0.5)
    assert_equal(matrix(inverse(mirrored), "second") @ matrix(mirrored, "second"), torch.eye(24).double())
    with pytest.raises(AdapterError, match="layer second: the adapter: got a singular"):
        inverse(singular)
    with pytest.raises(AdapterError, match=r"layer first: the adapter: got .* not finite \(outputs 0 and 2\)"):
        power(with_block(make("road_2", seed=1), "second", 0.0, 1.0), 1e5 + 0.5)


def test_adapters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer first: got group_size {'outer': 4, 'inner': 2}.*train the adapters"):
        compose_adapters(make(group_size=4), make(group_size=2))
    with pytest.raises(ConfigError, match=r"layer first: got group_size {'legal': 4, 'terse': 2}"):
        blend_adapters([make(group_size=4), make(group_size=2)], [0.5, 0.5], names=["legal", "terse"])
    narrow = Adapter({"first": LayerParameters(torch.zeros(4), torch.ones(4), "road_1", 4)})
    with pytest.raises(AdapterError, match=r"layer first: got out_features {'outer': 16, 'inner': 8}.*one base model"):
        compose_adapters(make(), narrow)
    whole = Adapter(make().layers, {}, {"base_model.model.head.weight": torch.zeros(2)})
    with pytest.raises(
        AdapterError, match=r"inner: got 1 tensors that are no rotations \(base_model.model.head.weight\)"
    ):
        compose_adapters(make(), whole)
    assert power(whole, 1) is whole
    for adapters, weights, names in (([], [], ()), ([make()], [1, 2], ()), ([make()] * 2, [1, 1], ["a", "a"])):
        with pytest.raises(AdapterError, match="wanted as many of each"):
            blend_adapters(adapters, weights, names=names)
    for weight in (math.nan, math.inf):
        with pytest.raises(AdapterError, match=r"got weights .*wanted finite numbers"):
            blend_adapters([make(), make()], [0.5, weight])


def test_results_too_large_for_float32_are_refused() -> None:
    large = Adapter({"first": LayerParameters(torch.zeros(8), torch.full((8,), 1e5), "road_1", 4)})
    assert power(large, 7).layers["first"].alpha.max() > 9e34
    with pytest.raises(AdapterError, match=r"layer first: got a result too large for torch.float32"):
        power(large, 8)


def test_the_inputs_stay_as_they_are() -> None:
    first, second = make("road_2"), make("road_4", seed=1)
    before = [(layer.theta.clone(), layer.alpha.clone()) for layer in (*first.layers.values(), *second.layers.values())]
    compose_adapters(first, second)
    blend_adapters([first, second], [0.5, -0.5])
    after = [(layer.theta, layer.alpha) for layer in (*first.layers.values(), *second.layers.values())]
    assert all(
        torch.equal(a, b) for pair, other in zip(before, after, strict=True) for a, b in zip(pair, other, strict=True)
    )
