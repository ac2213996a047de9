"""Adapters with several rotations in a row, combined: products exactly, the rest rotation by rotation, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation
from torch import Tensor, nn

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import parameter_size, split_stages

WIDTHS = {"first": 16, "second": 24, "third": 8}


def make(
    seed: int, stages: tuple[int, ...], variant: str = "road_2", layers: tuple[str, ...] = tuple(WIDTHS)
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for path in layers:
        size = len(stages) * parameter_size(variant, WIDTHS[path])
        theta, alpha = (0.2 * torch.randn(2, size, generator=generator, dtype=torch.float64)).unbind()
        parameters[path] = LayerParameters(theta, 1 + 0.5 * alpha, variant, stages)
    return Adapter(
        parameters, {"peft_type": "ROAD", "variant": variant, "stages": list(stages), "target_modules": [*layers]}
    )


def matrix(adapter: Adapter, path: str) -> Tensor:
    """``R_K ... R_1`` of a layer, from first principles; the identity where the adapter has none."""
    result = torch.eye(WIDTHS[path], dtype=torch.float64)
    layer = adapter.layers.get(path)
    if layer is not None:
        parts = (split_stages(values, len(layer.stages)) for values in (layer.theta, layer.alpha))
        for theta, alpha, size in zip(*parts, layer.stages, strict=True):
            result = dense_rotation(theta, alpha, layer.variant.value, size) @ result
    return result


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    # Condition numbers of a few units, a few dozen roundings.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


OPERANDS = [
    ((2, 8), (4, 2), (4, 2, 8)),  # neighbours of one size become one rotation
    ((2, 8), (4,), (4, 2, 8)),
    ((8,), (2, 4), (2, 4, 8)),
    ((4, 2), (8, 4), (8, 4, 2)),
]


@pytest.mark.parametrize("variant", ["road_1", "road_4"])
@pytest.mark.parametrize(("outer", "inner", "stages"), OPERANDS)
def test_a_product_is_one_after_the_other(outer, inner, stages, variant, tmp_path: Path) -> None:
    one, other = make(1, outer, variant), make(2, inner, variant, ("first", "third"))
    product = roadie.compose(one, other)
    for path in WIDTHS:
        assert_equal(matrix(product, path), matrix(one, path) @ matrix(other, path))
    assert product.layers["first"].stages == stages
    assert product.layers["second"].stages == outer
    assert {layer.variant.value for layer in product.layers.values()} == {"road_1" if variant == "road_1" else "road_2"}
    with pytest.warns(UserWarning, match="several rotations in a row"):
        checkpoint.save(product, tmp_path)
    again = checkpoint.load(tmp_path)
    assert {path: layer.stages for path, layer in again.layers.items()} == {
        path: layer.stages for path, layer in product.layers.items()
    }


def test_inverses_powers_and_differences() -> None:
    one, other = make(1, (2, 8, 4)), make(2, (8, 2))
    for path in WIDTHS:
        eye = torch.eye(WIDTHS[path], dtype=torch.float64)
        assert_equal(matrix(roadie.inverse(one), path) @ matrix(one, path), eye)
        assert_equal(matrix(roadie.power(one, 0), path), eye)
        assert_equal(matrix(roadie.power(one, -0.5), path) @ matrix(roadie.power(one, 0.5), path), eye)
        assert_equal(matrix(roadie.subtract(one, other), path) @ matrix(other, path), matrix(one, path))
    assert roadie.inverse(one).layers["first"].stages == (4, 8, 2)
    assert roadie.power(one, 1) is one
    half = roadie.power(one, 0.5).layers["first"]
    for rotation, whole in zip(half.rotations, one.layers["first"].rotations, strict=True):
        twice = roadie.compose(rotation, rotation)
        assert_equal(twice.direct, whole.direct)
        assert_equal(twice.cross, whole.cross)


def test_means_and_the_way_between_go_rotation_by_rotation() -> None:
    stages = (2, 8)
    one, other = make(1, stages), make(2, stages, layers=("first", "third"))
    middle, mean = roadie.interpolate(one, other, 0.3), roadie.mean([one, other], [1, 3])
    corrected = roadie.mean([one, other], [1, 3], magnitude_corrected=True)
    for number in range(2):
        parts = [adapter.layers["first"].rotations[number] for adapter in (one, other)]
        for result, wanted in (
            (middle, roadie.interpolate(*parts, 0.3)),
            (mean, roadie.mean(parts, [1, 3])),
            (corrected, roadie.mean(parts, [1, 3], magnitude_corrected=True)),
        ):
            assert_equal(result.layers["first"].rotations[number].direct, wanted.direct)
            assert_equal(result.layers["first"].rotations[number].cross, wanted.cross)
    assert_equal(matrix(roadie.interpolate(one, other, 1), "second"), torch.eye(24, dtype=torch.float64))
    assert_equal(matrix(roadie.interpolate(one, other, 0), "second"), matrix(one, "second"))


def test_stages_that_differ_do_not_blend_and_say_so() -> None:
    one, other = make(1, (2, 8)), make(2, (8, 2))
    with pytest.raises(ConfigError, match=r"layer first: got adapters with group sizes \[2, 8\] and \[8, 2\] in a row"):
        roadie.mean([one, other])
    with pytest.raises(ConfigError, match=r"group sizes \[2, 8\] and \[8\] in a row"):
        roadie.interpolate(one, make(3, (8,)), 0.5)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("convert", lambda a: roadie.convert(a, "road_4")),
        ("first", lambda a: roadie.distance(a, a)),
        ("adapter, looked at", lambda a: __import__("roadie.inspect").inspect.look(a)),
    ],
)
def test_what_takes_one_rotation_refuses_several(what, call) -> None:
    with pytest.raises(
        AdapterError, match=rf"{what}: got several rotations in a row \(stages \[2, 8\]\) in layer first; wanted"
    ):
        call(make(1, (2, 8)))


def test_as_lora_it_is_the_whole_change() -> None:
    adapter, model = make(1, (2, 8)), linear_chain(8, 16, 24, dtype=torch.float64)
    adapter = Adapter({path: layer for path, layer in adapter.layers.items() if path != "third"}, adapter.config)
    lora = roadie.to_lora(adapter, model, 1.0)
    for path in ("first", "second"):
        layer: nn.Linear = model.get_submodule(path)
        change = (matrix(adapter, path) - torch.eye(WIDTHS[path], dtype=torch.float64)) @ layer.weight
        name = f"base_model.model.{path}.lora"
        factors = lora.tensors[f"{name}_B.weight"] @ lora.tensors[f"{name}_A.weight"]
        assert_equal(factors, change)
        if layer.bias is not None:
            shift = (matrix(adapter, path) - torch.eye(WIDTHS[path], dtype=torch.float64)) @ layer.bias
            assert_equal(lora.tensors[f"{name}_B.bias"], shift)
