"""The laws of rotations, for shapes, variants and group sizes that hypothesis chooses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws import hand_computed
from tests.laws import rotations as laws
from tests.laws.reference import dense, dense_rotation

from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, from_parameters, inverse, parameter_size, rotate

VARIANTS = ("road_1", "road_2", "road_4")
SIZES = (2, 4, 16, 64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(variant: str, group_size: int, groups: int, seed: int, dtype: torch.dtype = torch.float64) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    n = parameter_size(variant, groups * group_size)
    theta = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    alpha = (1 + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)
    return from_parameters(theta, alpha, variant, group_size)


rotations = st.builds(
    lambda variants, size, groups, seed: [make(v, size, groups, seed + i) for i, v in enumerate(variants)],
    st.tuples(st.sampled_from(VARIANTS), st.sampled_from(VARIANTS)),
    st.sampled_from(SIZES),
    st.integers(1, 3),
    st.integers(0, 1000),
)


def x_for(rotation: Rotation, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, rotation.out_features, generator=torch.Generator().manual_seed(7)).to(dtype)


@settings(max_examples=25)
@given(rotations, st.integers(0, 4))
def test_composing_is_applying_twice(pair: list[Rotation], rows: int) -> None:
    laws.check_composing_is_applying_twice(x_for(pair[0], rows), *pair)


@settings(max_examples=25)
@given(rotations)
def test_the_inverse_undoes(pair: list[Rotation]) -> None:
    laws.check_inverse_undoes(x_for(pair[0], 3), pair[0])


@settings(max_examples=25)
@given(rotations, st.sampled_from(DTYPES))
def test_arithmetic_is_wide_and_rounded_once(pair: list[Rotation], dtype: torch.dtype) -> None:
    narrow = [Rotation(r.direct.float(), r.cross.float(), r.group_size) for r in pair]
    laws.check_one_rounding(x_for(pair[0], 3, dtype), *(pair if dtype == torch.float64 else narrow))


@settings(max_examples=15)
@given(rotations)
def test_a_rotated_weight_is_a_rotated_output(pair: list[Rotation]) -> None:
    out_features = pair[0].out_features
    weight, bias, x = (
        torch.randn(shape, dtype=torch.float64) for shape in ((out_features, 5), (out_features,), (3, 5))
    )
    laws.check_rotated_weight_is_rotated_output(x, weight, bias, pair[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_make_the_whole(variant: str, world_size: int) -> None:
    rotation = make(variant, 4, 8, 0)
    laws.check_shards_make_the_whole(x_for(rotation, 3), rotation, world_size)


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize(
    ("source", "target"), [("road_1", "road_1"), *((s, t) for s in VARIANTS for t in VARIANTS[1:])]
)
def test_parameters_come_back(source: str, target: str, group_size: int) -> None:
    laws.check_parameters_come_back(make(source, group_size, 2, 1), target)


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dense_matrix_is_that_of_first_principles(variant: str, group_size: int) -> None:
    n = parameter_size(variant, 2 * group_size)
    theta, alpha = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rotation = from_parameters(theta, alpha, variant, group_size)
    torch.testing.assert_close(dense(rotation), dense_rotation(theta, alpha, variant, group_size))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant: str) -> None:
    n = parameter_size(variant, 8)
    theta, alpha = (torch.randn(n, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, t, a: rotate(x, from_parameters(t, a, variant, 4)), (x, theta, alpha))


def test_values_computed_by_hand() -> None:
    hand_computed.check_quarter_turn()
    hand_computed.check_pairs()
    hand_computed.check_stored_layouts()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="group sizes 4 and 2"):
        compose(make("road_1", 4, 1, 0), make("road_1", 2, 2, 0))
    singular = Rotation(torch.zeros(4), torch.zeros(4), 2)
    with pytest.raises(AdapterError, match="singular"):
        inverse(singular)
    with pytest.raises(AdapterError, match="3 parameters"):
        from_parameters(torch.zeros(3), torch.zeros(3), "road_1", 4)
    with pytest.raises(ConfigError, match="Invalid variant road_3"):
        from_parameters(torch.zeros(2), torch.zeros(2), "road_3", 4)
    with pytest.raises(AdapterError, match="equal sizes"):
        rotate(torch.zeros(3, 6), make("road_1", 4, 1, 0))
