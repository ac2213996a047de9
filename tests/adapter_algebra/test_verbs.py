"""The verbs on rotations and on adapters: layer by layer against dense matrices, on disk, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import peft
import pytest
import torch
from tests.laws.models import linear_chain
from tests.laws.reference import dense, dense_rotation

import roadie
from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, Variant, parameter_size
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

VARIANTS = tuple(variant.value for variant in Variant)
WIDTHS = {"first": 16, "second": 24, "third": 8}


def make(variant="road_1", group_size=4, layers=WIDTHS, seed=0, dtype=torch.float64, **config) -> Adapter:
    """Moderate rotations: angles of about 0.2, alphas of about 1 +- 0.06."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for path in layers:
        size = parameter_size(variant, WIDTHS[path])
        theta, alpha = torch.randn(2, size, generator=generator, dtype=torch.float64) * 0.2
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
    # Condition numbers of a few units, angles of a few radians, some dozen roundings.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


PAIRS = [("road_1", "road_1"), ("road_1", "road_2"), ("road_4", "road_1"), ("road_4", "road_4")]


@pytest.mark.parametrize("variants", PAIRS, ids="-".join)
def test_every_verb_is_what_it_is_for_dense_matrices(variants) -> None:
    """With a layer of its own in each: the identity in the other."""
    first = make(variants[0], layers=["first", "third"])
    second = make(variants[1], layers=["second", "third"], seed=1)
    composed, left = roadie.compose(first, second), roadie.subtract(first, second)
    quarter, middle = roadie.interpolate(first, second, 0.25), roadie.mean([first, second], [3, 1])
    for path in WIDTHS:
        one, two = matrix(first, path), matrix(second, path)
        assert_equal(matrix(composed, path), one @ two)
        assert_equal(matrix(left, path) @ two, one)
        gone = torch.linalg.solve(one, matrix(quarter, path))
        assert_equal(torch.linalg.matrix_power(gone, 4), torch.linalg.solve(one, two))
        assert_equal(matrix(middle, path), torch.linalg.matrix_exp(0.75 * logarithm(one) + 0.25 * logarithm(two)))
        assert_equal(matrix(roadie.inverse(first), path) @ one, torch.eye(len(one), dtype=torch.float64))
        assert_equal(torch.linalg.matrix_power(matrix(roadie.power(second, 0.5), path), 2), two)


def logarithm(dense_matrix: torch.Tensor) -> torch.Tensor:
    """By the series, which converges fast for rotations near the identity."""
    scale, root = 1, dense_matrix
    for _ in range(6):  # root of root of ...: Denman and Beavers
        root, scale = square_root(root), 2 * scale
    off, power, total = root - torch.eye(len(root), dtype=root.dtype), torch.eye(len(root), dtype=root.dtype), 0
    for n in range(1, 20):
        power = power @ off
        total = total - (-1) ** n / n * power
    return scale * total


def square_root(value: torch.Tensor) -> torch.Tensor:
    root, other = value, torch.eye(len(value), dtype=value.dtype)
    for _ in range(12):
        root, other = (root + torch.linalg.inv(other)) / 2, (other + torch.linalg.inv(root)) / 2
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotations_and_adapters_mean_the_same(variant) -> None:
    adapters = [make(variant, layers=["first"], seed=seed) for seed in range(2)]
    one, two = (adapter.layers["first"].rotation for adapter in adapters)
    for verb in VERBS.values():
        assert_equal(matrix(verb(*adapters), "first"), dense(verb(one, two)))
    for metric in ("chordal", "geodesic"):
        assert roadie.distance(*adapters, metric) == pytest.approx(roadie.distance(one, two, metric), rel=1e-13)


VERBS: dict[str, Callable] = {
    "compose": roadie.compose,
    "inverse": lambda first, _: roadie.inverse(first),
    "power": lambda first, _: roadie.power(first, 0.5),
    "interpolate": lambda first, second: roadie.interpolate(first, second, 0.25),
    "mean": lambda first, second: roadie.mean([first, second]),
    "corrected mean": lambda first, second: roadie.mean([first, second], magnitude_corrected=True),
    "subtract": roadie.subtract,
}
BINARY = [*(name for name in VERBS if name not in ("inverse", "power")), "distance"]


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("variants", [("road_1", "road_1"), ("road_2", "road_1")], ids="-".join)
def test_results_are_saved_loaded_and_computed_by_stock_peft(name, variants, tmp_path) -> None:
    first, second = (make(variant, seed=seed, dtype=torch.float32) for seed, variant in enumerate(variants))
    result = VERBS[name](first, second)
    checkpoint.save(result, tmp_path)
    again = checkpoint.load(tmp_path)
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = linear_chain(12, 16, 24, 8, dtype=torch.float64)
    with stock_peft():
        model = peft.PeftModel.from_pretrained(linear_chain(12, 16, 24, 8, dtype=torch.float64), str(tmp_path))
        assert is_stock(model)
        got = model(x)
    for path, layer in plain.named_children():
        assert torch.equal(matrix(again, path), matrix(result, path))
        x = layer(x) @ matrix(result, path).mT
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)  # stock PEFT computes with float32 parameters


def test_results_have_the_smallest_variant_that_holds_them() -> None:
    road_1, road_2 = make("road_1"), make("road_2")
    as_road_2 = roadie.convert(road_1, "road_2").adapter
    assert roadie.compose(road_1, make(seed=1)).variants == (Variant.ROAD_1,)
    assert roadie.compose(road_1, road_2).variants == (Variant.ROAD_2,)
    assert roadie.compose(as_road_2, make(seed=1)).variants == (Variant.ROAD_1,)  # its rows agree
    assert roadie.power(make("road_4"), 2).variants == (Variant.ROAD_2,)
    for result in (
        roadie.power(road_2, 0),
        roadie.interpolate(road_2, road_1, 1),
        roadie.mean([road_2, road_1], [0, 1]),
    ):
        assert result.variants == (Variant.ROAD_1,)


def test_layers_that_turn_nothing_fit_every_group_size() -> None:
    """Scales alone, one a pair of 4: in groups of 2 the members of a pair differ, which only road_2 holds."""
    scales = Adapter({"first": LayerParameters(torch.zeros(8), torch.linspace(0.5, 2, 8), "road_1", 4)})
    twos = make("road_1", group_size=2, layers=["first"])
    for result in (roadie.compose(scales, twos), roadie.compose(twos, scales)):
        assert result.layers["first"].group_size == 2
        assert result.variants == (Variant.ROAD_2,)
    assert_equal(matrix(roadie.compose(scales, twos), "first"), matrix(scales, "first") @ matrix(twos, "first"))


def test_distances_are_those_of_dense_matrices_over_all_outputs() -> None:
    first, second = make("road_2", layers=["first", "third"]), make("road_4", layers=["second", "third"], seed=1)
    squares = [float((matrix(first, path) - matrix(second, path)).square().sum()) for path in WIDTHS]
    assert roadie.distance(first, second) == pytest.approx(math.sqrt(sum(squares) / 48), rel=1e-13)
    assert roadie.distance(first, first) == 0
    identity = roadie.power(first, 0)
    assert roadie.distance(roadie.power(first, 0.5), identity, "geodesic") == pytest.approx(
        roadie.distance(first, identity, "geodesic") / 2, rel=1e-12
    )


def test_the_embedded_model_is_one_base_wherever_it_lies() -> None:
    first = make(base_model_name_or_path="/home/one/roadie/embedded/model")
    second = make(base_model_name_or_path=r"C:\site-packages\roadie\embedded\model", seed=1)
    roadie.compose(first, second)
    roadie.compose(first, make(seed=1))  # one that names none


@pytest.mark.parametrize("name", BINARY)
def test_adapters_of_different_bases_are_refused(name) -> None:
    verb = VERBS.get(name, roadie.distance)
    first, second = (make(base_model_name_or_path=name) for name in ("llama", "qwen"))
    with pytest.raises(AdapterError, match=r"different base models \(llama, qwen\).*base_model_name_or_path"):
        verb(first, second)


@pytest.mark.parametrize("name", BINARY)
def test_different_group_sizes_are_refused(name) -> None:
    verb = VERBS.get(name, roadie.distance)
    with pytest.raises(ConfigError, match=r"layer first: got group_size .*4.*2.*share no pair"):
        verb(make(group_size=4), make(group_size=2))
    with pytest.raises(ConfigError, match=r"group_size .*4.*2.*share no pair"):
        verb(*(make(group_size=size).layers["first"].rotation for size in (4, 2)))


@pytest.mark.parametrize("name", VERBS)
def test_values_that_are_not_finite_are_refused(name) -> None:
    bad = make()
    bad.layers["second"].theta[3] = math.nan
    with pytest.raises(AdapterError, match=r"layer second: .*not finite"):
        VERBS[name](bad, make(seed=1))


def test_singular_blocks_are_refused_where_an_inverse_is_needed() -> None:
    singular = make("road_2")
    singular.layers["third"].alpha[0] = 0
    good = make("road_2", seed=1)
    roadie.compose(singular, good)
    for call in (
        lambda: roadie.inverse(singular),
        lambda: roadie.subtract(good, singular),
        lambda: roadie.interpolate(singular, good, 0.5),
        lambda: roadie.mean([singular, good]),
        lambda: roadie.power(singular, -2),
        lambda: roadie.distance(singular, good, "geodesic"),
    ):
        with pytest.raises(AdapterError, match=r"layer third: .*singular"):
            call()


def test_other_things_than_adapters_and_rotations_are_refused() -> None:
    rotation = make().layers["first"].rotation
    for call in (
        lambda: roadie.compose(make(), rotation),
        lambda: roadie.mean([rotation, make()]),
        lambda: roadie.inverse("my-adapter"),
        lambda: roadie.distance(rotation, "my-adapter"),
    ):
        with pytest.raises(AdapterError, match=r"got .*; wanted Rotation or Adapter values.*checkpoint.load"):
            call()
    with pytest.raises(AdapterError, match="at least one"):
        roadie.mean([])
    whole = Adapter(make().layers, {}, {"base_model.model.head.weight": torch.zeros(2)})
    for call in (lambda: roadie.mean([whole, make()]), lambda: roadie.distance(make(), whole)):
        with pytest.raises(AdapterError, match="tensors that are no rotations"):
            call()


def test_inputs_stay_as_they_are() -> None:
    first, second = make("road_2"), make("road_1", seed=1)
    before = [layer.theta.clone() for adapter in (first, second) for layer in adapter.layers.values()]
    for verb in VERBS.values():
        verb(first, second)
        verb(*(adapter.layers["first"].rotation for adapter in (first, second)))
    after = [layer.theta for adapter in (first, second) for layer in adapter.layers.values()]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


def test_rotations_keep_their_dtype_where_nothing_needs_more() -> None:
    narrow = Rotation(torch.ones(4), torch.full((4,), 0.5), 4)
    assert roadie.compose(narrow, narrow).direct.dtype == roadie.inverse(narrow).direct.dtype == torch.float32
    assert roadie.interpolate(narrow, narrow, 0.5).direct.dtype == torch.float64
