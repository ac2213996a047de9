"""Adapters that rotate inputs of layers too, combined: what they make of a weight, against dense matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import dense_rotation
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import roadie
import roadie.subspaces
from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters, resolve_layer, rotates_input
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import parameter_size, split_stages

SHAPES = {"first": (16, 8), "second": (24, 16)}  # outputs, inputs
Sites = dict[str, tuple[int, ...]]
PLAIN: Sites = {"first": (8,), "second": (8,)}
INPUTS: Sites = {"first": (8,), "first.road_input": (8,), "second": (8,), "second.road_input": (8,)}
PARTLY: Sites = {"first": (8,), "first.road_input": (8,)}
CHAINS: Sites = {"first": (8, 2), "first.road_input": (4, 2), "second": (8,), "second.road_input": (2, 8)}


def make(seed: int, sites: Sites, variant: str = "road_2") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for path, stages in sites.items():
        size = len(stages) * parameter_size(variant, width(path))
        theta, alpha = (0.3 * torch.randn(2, size, generator=generator, dtype=torch.float64)).unbind()
        parameters[path] = LayerParameters(theta, 1 + 0.5 * alpha, variant, stages)
    return Adapter(parameters, {"peft_type": "ROAD", "variant": variant})


def width(path: str) -> int:
    out_features, in_features = SHAPES[path.removesuffix(INPUT_SUFFIX)]
    return in_features if path.endswith(INPUT_SUFFIX) else out_features


def matrix(adapter: Adapter, path: str) -> Tensor:
    """``R_K ... R_1`` of a site, from first principles; the identity where the adapter has none."""
    result = torch.eye(width(path), dtype=torch.float64)
    site = adapter.layers.get(path)
    if site is not None:
        parts = (split_stages(values, len(site.stages)) for values in (site.theta, site.alpha))
        for theta, alpha, size in zip(*parts, site.stages, strict=True):
            result = dense_rotation(theta, alpha, site.variant.value, size) @ result
    return result


def adapted(adapter: Adapter, path: str, weight: Tensor) -> Tensor:
    """What the adapter makes of a weight ``[D, in]``: ``R W Q``."""
    return matrix(adapter, path) @ weight @ matrix(adapter, f"{path}{INPUT_SUFFIX}")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {path: torch.randn(shape, generator=generator, dtype=torch.float64) for path, shape in SHAPES.items()}


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    # Condition numbers of a few units, a hundred roundings, elements of up to a hundred.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


PAIRS = [(INPUTS, INPUTS), (PLAIN, INPUTS), (INPUTS, PARTLY), (CHAINS, INPUTS), (CHAINS, CHAINS), (PARTLY, CHAINS)]


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_a_product_adapts_what_the_inner_one_adapted(outer: Sites, inner: Sites) -> None:
    one, other = make(1, outer), make(2, inner)
    product, undone = roadie.compose(one, other), roadie.inverse(one)
    difference = roadie.subtract(one, other)
    for path, weight in weights().items():
        assert_equal(adapted(product, path, weight), adapted(one, path, adapted(other, path, weight)))
        assert_equal(adapted(undone, path, adapted(one, path, weight)), weight)
        assert_equal(adapted(difference, path, adapted(other, path, weight)), adapted(one, path, weight))


def test_a_strength_of_half_twice_is_the_whole() -> None:
    adapter = make(1, INPUTS)
    half, twice = roadie.power(adapter, 0.5), roadie.power(adapter, 2)
    for path, weight in weights().items():
        whole = adapted(adapter, path, weight)
        assert_equal(adapted(half, path, adapted(half, path, weight)), whole)
        assert_equal(adapted(twice, path, weight), adapted(adapter, path, whole))
        assert_equal(adapted(roadie.power(adapter, 0), path, weight), weight)


@pytest.mark.parametrize("combine", [lambda *x: roadie.mean(x, [1, 3]), lambda *x: roadie.interpolate(*x, 0.3)])
def test_means_and_the_way_between_are_those_of_each_site(combine: Callable[..., Any]) -> None:
    one, other = make(1, INPUTS), make(2, PARTLY)
    result = combine(one, other)
    assert set(result.layers) == set(INPUTS)
    for path in INPUTS:
        size, site = one.layers[path].group_size, result.layers[path]
        none = roadie.Rotation(*(torch.full((width(path),), v, dtype=torch.float64) for v in (1.0, 0.0)), size)
        parts = [a.layers[path].rotation if path in a.layers else none for a in (one, other)]
        wanted = combine(*parts)
        assert_equal(site.rotation.direct, wanted.direct)
        assert_equal(site.rotation.cross, wanted.cross)


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_the_config_of_a_result_says_what_it_has_and_its_file_comes_back(
    outer: Sites, inner: Sites, tmp_path: Path
) -> None:
    result = roadie.compose(make(1, outer), make(2, inner))
    assert result.config["target_modules"] == ["first", "second"]
    for path in SHAPES:
        assert rotates_input(result.config, path) == (f"{path}{INPUT_SUFFIX}" in result.layers)
    for path, site in result.layers.items():
        assert resolve_layer(result.config, path, width(path)) == (site.variant, site.stages)
    with pytest.warns(UserWarning, match="stock PEFT"):
        checkpoint.save(result, tmp_path)
    again = checkpoint.load(tmp_path)
    assert {path: site.stages for path, site in again.layers.items()} == {
        path: site.stages for path, site in result.layers.items()
    }
    for path, site in result.layers.items():
        assert torch.equal(again.layers[path].theta, site.theta)


def test_a_path_that_ends_in_another_one_is_told_apart() -> None:
    theta = torch.zeros(8, dtype=torch.float64)
    parts = {path: LayerParameters(theta, theta + 1, "road_2", 8) for path in ("proj", "proj.road_input", "deep.proj")}
    result = roadie.power(Adapter(parts), 0.5)
    assert rotates_input(result.config, "proj")
    assert not rotates_input(result.config, "deep.proj")
    config = {"group_size": 8, "input_stages": [8]}  # which is not so
    assert not rotates_input(roadie.power(Adapter(parts, config), 0.5).config, "deep.proj")


def test_inputs_of_different_group_sizes_do_not_make_a_rotation() -> None:
    other = make(2, {**INPUTS, "second.road_input": (4,)})
    with pytest.raises(ConfigError, match=r"layer second\.road_input: got group"):
        roadie.compose(make(1, INPUTS), other)


def test_a_distance_counts_every_output_and_every_input() -> None:
    one, other = make(1, INPUTS), make(2, PARTLY)
    squares, widths = 0.0, 0
    for path in INPUTS:
        squares += float((matrix(one, path) - matrix(other, path)).square().sum())
        widths += width(path)
    assert roadie.distance(one, other) == pytest.approx(math.sqrt(squares / widths), rel=1e-12)


def test_conversions_are_those_of_each_site() -> None:
    adapter = make(1, INPUTS, "road_1")
    converted = roadie.convert(adapter, "road_4")
    assert converted.is_exact
    for path, weight in weights().items():
        assert_equal(adapted(converted.adapter, path, weight), adapted(adapter, path, weight))
    back = roadie.convert(converted.adapter, "road_1").adapter
    assert all(torch.equal(back.layers[path].theta, site.theta) for path, site in adapter.layers.items())


def test_shares_of_pairs_are_joined_as_they_are_multiplied() -> None:
    adapter = make(1, INPUTS)
    first, second = roadie.subspaces.split(adapter, 2)
    joined, product = roadie.subspaces.join([first, second]), roadie.compose(second, first)
    for path, weight in weights().items():
        assert_equal(adapted(joined, path, weight), adapted(adapter, path, weight))
        assert_equal(adapted(product, path, weight), adapted(adapter, path, weight))


@pytest.mark.parametrize("sites", [INPUTS, CHAINS, PARTLY, {"second.road_input": (4, 8)}], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_as_lora_it_is_the_whole_change(kind: type, sites: Sites) -> None:
    adapter, model = make(1, sites), nn.Module()
    for path, (out_features, in_features) in SHAPES.items():
        layer = Conv1D(out_features, in_features) if kind is Conv1D else nn.Linear(in_features, out_features)
        nn.init.normal_(layer.bias)
        model.add_module(path, layer.double())
    lora = roadie.to_lora(adapter, model, 1.0)
    paths = {path.removesuffix(INPUT_SUFFIX) for path in sites}
    assert set(lora.fits) == paths == set(lora.config["target_modules"])
    for path in paths:
        layer = model.get_submodule(path)
        weight = layer.weight.detach().mT if kind is Conv1D else layer.weight.detach()
        name = f"base_model.model.{path}.lora"
        assert_equal(
            lora.tensors[f"{name}_B.weight"] @ lora.tensors[f"{name}_A.weight"], adapted(adapter, path, weight) - weight
        )
        shifted = (
            matrix(adapter, path) @ layer.bias.detach() - layer.bias.detach()
        )  # the input's rotation does not meet it
        assert_equal(lora.tensors[f"{name}_B.bias"], shifted)


def test_lora_of_another_models_inputs_is_refused() -> None:
    model = nn.Module()
    model.add_module("first", nn.Linear(12, 16))
    with pytest.raises(AdapterError, match=r"layer first\.road_input: got 12 inputs in the model and 8 in the adapter"):
        roadie.to_lora(make(1, PARTLY), model, 2)
