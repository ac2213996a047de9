"""Conversions: bit for bit where that is possible, the nearest where not, with what is lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.reference import dense_rotation, pairs

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant, parameter_size

WIDTHS = {"first": 16, "a.second": 8}


def make(variant, group_size=4, seed=0, dtype=torch.float32, spread=1.0, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, width in WIDTHS.items():
        theta, alpha = torch.randn(2, parameter_size(variant, width), generator=generator) * spread
        layers[path] = LayerParameters(theta.to(dtype), (1 + 0.3 * alpha).to(dtype), variant, group_size)
    return Adapter(
        layers, {"peft_type": "ROAD", "variant": variant, "group_size": group_size, "target_modules": ["x"], **config}
    )


def matrix(layer: LayerParameters) -> torch.Tensor:
    return dense_rotation(layer.theta, layer.alpha, layer.variant.value, layer.group_size)


def assert_same_parameters(got: Adapter, wanted: Adapter) -> None:
    assert got.layers.keys() == wanted.layers.keys()
    for path, layer in wanted.layers.items():
        assert got.layers[path].variant is layer.variant
        assert got.layers[path].theta.dtype == layer.theta.dtype
        assert torch.equal(got.layers[path].theta, layer.theta)
        assert torch.equal(got.layers[path].alpha, layer.alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("small", "large"), [("road_1", "road_2"), ("road_2", "road_4"), ("road_1", "road_4")])
def test_larger_variants_hold_it_bit_for_bit_and_give_it_back(small, large, dtype, tmp_path) -> None:
    adapter = make(small, dtype=dtype, variant_pattern={})
    there = roadie.convert(adapter, large)
    assert there.is_exact
    assert (there.distance, there.share_lost) == (0, 0)
    assert there.adapter.variants == (Variant(large),)
    for path, layer in adapter.layers.items():
        assert torch.equal(matrix(there.adapter.layers[path]), matrix(layer))
    checkpoint.save(there.adapter, tmp_path)
    back = roadie.convert(checkpoint.load(tmp_path), small)
    assert back.is_exact
    assert_same_parameters(back.adapter, adapter)


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_road_4_is_road_2_but_for_rounding(group_size) -> None:
    adapter = make("road_4", group_size)
    conversion = roadie.convert(adapter, "road_2")
    assert conversion.is_exact
    for path, layer in adapter.layers.items():
        got = conversion.adapter.layers[path]
        assert got.theta.dtype == torch.float32
        size = torch.hypot(*(vector.double() for vector in (layer.rotation.direct, layer.rotation.cross)))
        # An angle of up to pi is rounded, and alpha: 4 u of the row at most.
        room = (math.pi + 1) * torch.finfo(torch.float32).eps / 2 * size[:, None]
        assert bool(((matrix(got) - matrix(layer)).abs() <= room).all())
    wide = roadie.convert(make("road_4", dtype=torch.float64), "road_2").adapter
    assert wide.layers["first"].theta.dtype == torch.float64


@settings(max_examples=30)
@given(st.sampled_from(("road_2", "road_4")), st.sampled_from((2, 4, 8)), st.integers(0, 1000))
def test_road_1_is_the_nearest_scaled_rotation(variant, group_size, seed) -> None:
    """Least squares over x and y in ``x I + y J``, and the residue it leaves."""
    adapter = make(variant, group_size, seed, dtype=torch.float64)
    conversion = roadie.convert(adapter, "road_1")
    for path, layer in adapter.layers.items():
        before, after, lost = matrix(layer), matrix(conversion.adapter.layers[path]), 0.0
        for i, k in pairs(len(before), group_size):
            block = before[[i, i, k, k], [i, k, i, k]]
            shape = torch.tensor([[1, 0], [0, -1], [0, 1], [1, 0]], dtype=torch.float64)
            x, y = torch.linalg.lstsq(shape, block[:, None]).solution[:, 0]
            nearest = torch.stack((x, -y, y, x))
            torch.testing.assert_close(after[[i, i, k, k], [i, k, i, k]], nearest, rtol=0, atol=1e-14)
            lost += float((nearest - block).square().sum())
        loss = conversion.losses[path]
        assert loss.lost == pytest.approx(lost, rel=1e-10)
        assert loss.change == pytest.approx(float((before - torch.eye(len(before))).square().sum()), rel=1e-12)
        assert loss.mirrored == sum(
            float(torch.linalg.det(before[[i, k]][:, [i, k]])) < 0 for i, k in pairs(len(before), group_size)
        )
    losses = conversion.losses.values()
    total = sum(loss.lost for loss in losses)
    assert conversion.distance == pytest.approx(math.sqrt(total / 24), rel=1e-12)
    assert conversion.distance == pytest.approx(roadie.distance(adapter, conversion.adapter), rel=1e-9)
    assert conversion.share_lost == pytest.approx(total / sum(loss.change for loss in losses), rel=1e-12)
    assert not conversion.is_exact


def test_layers_keep_their_variant_and_settings_unless_one_is_asked_for() -> None:
    adapter = make("road_2", task_type="CAUSAL_LM", unknown=1)
    layers = {**adapter.layers, "a.second": make("road_1").layers["a.second"]}
    mixed = Adapter(layers, {**adapter.config, "variant_pattern": {"second": "road_1"}}, {"head.weight": torch.ones(2)})
    assert_same_parameters(roadie.convert(mixed).adapter, mixed)
    assert dict(roadie.convert(mixed).adapter.config) == dict(mixed.config)
    converted = roadie.convert(mixed, Variant.ROAD_4).adapter
    assert "variant_pattern" not in converted.config
    assert (converted.config["variant"], converted.config["unknown"]) == ("road_4", 1)
    assert torch.equal(converted.other["head.weight"], torch.ones(2))


def scales(variant="road_1", group_size=4) -> Adapter:
    """Nothing turns; half of the outputs are scaled."""
    adapter = make(variant, group_size, dtype=torch.float64)
    layers = {
        path: LayerParameters(layer.theta * 0, layer.alpha, variant, group_size)
        for path, layer in adapter.layers.items()
    }
    return Adapter(layers, adapter.config)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group_size", [2, 8])
def test_what_does_not_turn_changes_its_group_size(variant, group_size, tmp_path) -> None:
    adapter = scales(variant)
    conversion = roadie.convert(adapter, group_size=group_size)
    assert conversion.is_exact
    assert conversion.adapter.group_sizes == (group_size,)
    assert conversion.adapter.variants == (Variant.ROAD_2,)
    for path, layer in adapter.layers.items():
        assert torch.equal(matrix(conversion.adapter.layers[path]), matrix(layer))
    checkpoint.save(conversion.adapter, tmp_path)
    assert checkpoint.load(tmp_path).group_sizes == (group_size,)
    nearest = roadie.convert(adapter, "road_1", group_size=group_size)
    assert nearest.adapter.variants == (Variant.ROAD_1,)
    assert not nearest.is_exact
    one = roadie.power(adapter, 0)  # which road_1 holds in every group size
    assert roadie.convert(one, group_size=group_size).adapter.variants == (Variant.ROAD_1,)


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer first: got group_size=2 .*group_size=4; two sizes share no pair"):
        roadie.convert(make("road_1"), group_size=2)
    with pytest.raises(ConfigError, match=r"layer a.second: .*divisible by group_size \(16\)"):
        roadie.convert(scales(), group_size=16)
    with pytest.raises(ConfigError, match="Invalid variant"):
        roadie.convert(make("road_1"), "road_3")
    bad = make("road_2")
    bad.layers["a.second"].theta[0] = math.inf
    with pytest.raises(AdapterError, match=r"layer a.second: .*not finite"):
        roadie.convert(bad, "road_1")
