"""Interpolation, means, differences and distances, for rotations that hypothesis chooses, and values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws import geometry as geometry_laws
from tests.laws.reference import dense

from roadie.algebra import (
    Metric,
    corrected_weights,
    in_one_pairing,
    interpolate,
    mean,
    power,
    shares,
    squared_distance,
    subtract,
)
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, from_parameters, parameter_size

VARIANTS = ("road_1", "road_2", "road_4")


def make(variant: str, group_size: int, groups: int, seed: int, spread: float) -> Rotation:
    """Random parameters: angles of about `spread`, alphas of 1 +- 0.3 spread."""
    generator = torch.Generator().manual_seed(seed)
    size = parameter_size(variant, groups * group_size)
    theta, alpha = torch.randn(2, size, generator=generator, dtype=torch.float64).clamp(-2.5, 2.5) * spread
    return from_parameters(theta, 1 + 0.3 * alpha, variant, group_size)


def several(count: int, spreads: tuple[float, ...] = (1e-6, 1e-3, 0.05, 0.2)) -> st.SearchStrategy[list[Rotation]]:
    """Rotations of one shape, near enough to each other that the way from one to another has a logarithm."""
    return st.builds(
        lambda variants, size, groups, seed, spread: [
            make(variant, size, groups, 10 * seed + i, spread) for i, variant in enumerate(variants)
        ],
        st.tuples(*[st.sampled_from(VARIANTS)] * count),
        st.sampled_from((2, 4, 16)),
        st.integers(1, 3),
        st.integers(0, 1000),
        st.sampled_from(spreads),
    )


@settings(max_examples=60)
@given(several(2), st.integers(2, 6).flatmap(lambda q: st.tuples(st.integers(1, q - 1), st.just(q))))
def test_a_point_between_has_the_powers_it_must_have(rotations, fraction) -> None:
    geometry_laws.check_interpolation(*rotations, *fraction)


@pytest.mark.slow
@settings(max_examples=40)
@given(several(3, (1e-3, 0.2)), st.integers(-8, 16).map(lambda n: n / 8))
def test_the_way_back_and_ways_moved_along(rotations, t) -> None:
    start, end, by = rotations
    geometry_laws.check_the_way_back(start, end, t)
    geometry_laws.check_moved_along(start, end, by, t)


@settings(max_examples=25)
@given(several(2, (0.2, 3.0)))
def test_the_ends_are_the_ends_with_or_without_logarithm(rotations) -> None:
    geometry_laws.check_ends_of_interpolation(*rotations)
    singular = Rotation(torch.zeros_like(rotations[0].direct), rotations[0].cross * 0, rotations[0].group_size)
    geometry_laws.check_ends_of_interpolation(singular, rotations[1])


@settings(max_examples=60)
@given(st.integers(0, 1000), st.floats(-1, 2), st.integers(1, 6))
def test_interpolating_road_1_is_the_geodesic(seed, t, pairs) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta, alpha = torch.rand(2, 2, pairs, generator=generator, dtype=torch.float64)
    geometry_laws.check_geodesic(math.pi * (2 * theta - 1), 0.1 + 2 * alpha, t)


@settings(max_examples=40)
@given(several(3), st.lists(st.floats(0.01, 5), min_size=3, max_size=3))
def test_means_are_those_of_dense_matrices(rotations, weights) -> None:
    geometry_laws.check_mean(rotations, weights)
    geometry_laws.check_corrected_mean(rotations, weights)


@settings(max_examples=40)
@given(several(2, (1e-6, 0.2, 0.5)))
def test_a_difference_is_that_of_dense_matrices_and_adds_up(rotations) -> None:
    geometry_laws.check_subtraction(*rotations)


@settings(max_examples=40)
@given(several(3, (1e-6, 0.2, 3.0)))
def test_the_chordal_distance_is_that_of_dense_matrices(rotations) -> None:
    geometry_laws.check_chordal_distance(*rotations)


@settings(max_examples=40)
@given(several(3, (1e-6, 1e-3, 0.2)))
def test_the_geodesic_distance_is_a_length_that_nothing_applied_after_changes(rotations) -> None:
    geometry_laws.check_geodesic_distance(*rotations)


def turn(*degrees: float, alpha: float = 1.0, group_size: int = 2) -> Rotation:
    """A road_1 rotation, an angle a pair; pairs in groups of 2."""
    theta = torch.tensor([math.radians(angle) for angle in degrees], dtype=torch.float64)
    return from_parameters(theta, torch.full_like(theta, alpha), "road_1", group_size)


def assert_turns(rotation: Rotation, wanted: Rotation) -> None:
    torch.testing.assert_close(dense(rotation), dense(wanted), rtol=1e-14, atol=1e-14)


def test_values_worked_out_by_hand() -> None:
    """The short way from 170 to -170 degrees is over 180; the mean of their logarithms is 0."""
    assert_turns(interpolate(turn(170), turn(-170), 0.25), turn(175))
    assert_turns(interpolate(turn(10, alpha=2), turn(50, alpha=8), 0.5), turn(30, alpha=4))
    assert_turns(interpolate(turn(10), turn(20), 3), turn(40))
    assert_turns(mean([turn(170), turn(-170)]), turn(0))
    assert_turns(mean([turn(10), turn(40)], [2, 1]), turn(20))
    assert_turns(subtract(turn(50, alpha=6), turn(20, alpha=3)), turn(30, alpha=2))
    assert squared_distance(turn(10, 0), turn(10, 90), Metric.CHORDAL) == pytest.approx(4, rel=1e-15)
    geodesic = squared_distance(turn(170, alpha=2), turn(-170, alpha=2 * math.e), Metric.GEODESIC)
    assert geodesic == pytest.approx(2 * (1 + math.radians(20) ** 2), rel=1e-14)


def test_the_magnitude_correction_worked_out_by_hand() -> None:
    """One turns the first pair by 30 degrees, the other the second: their mean is 30 / sqrt(2) long, and made 30 again."""
    corrected = mean([turn(30, 0), turn(0, 30)], magnitude_corrected=True)
    assert_turns(corrected, turn(30 / math.sqrt(2), 30 / math.sqrt(2)))
    assert corrected_weights([turn(30, 0), turn(0, 30)], [0.25, 0.75]) == pytest.approx(
        [0.25 / math.sqrt(0.625), 0.75 / math.sqrt(0.625)], rel=1e-14
    )
    assert_turns(mean([turn(30, 0), turn(60, 0)], magnitude_corrected=True), turn(45, 0))


def test_what_cancels_is_not_stretched() -> None:
    assert corrected_weights([turn(30, 10), turn(-30, -10)], [0.5, 0.5]) == [0.5, 0.5]
    assert corrected_weights([turn(30), turn(50)], [0.0, 1.0]) == [0.0, 1.0]


def test_what_does_not_turn_fits_every_group_size() -> None:
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    diagonal = Rotation(scales, torch.zeros_like(scales), 4)
    twos = turn(20, 50)
    aligned = in_one_pairing({"a": diagonal, "b": twos})
    assert [part.group_size for part in aligned.values()] == [2, 2]
    product = compose(aligned["a"], aligned["b"])
    torch.testing.assert_close(dense(product), torch.diag(scales) @ dense(twos), rtol=1e-15, atol=0)
    assert in_one_pairing({"a": diagonal, "b": Rotation(scales, scales * 0, 2)})["b"].group_size == 4
    assert squared_distance(diagonal, twos, Metric.CHORDAL) == pytest.approx(
        float((torch.diag(scales) - dense(twos)).square().sum()), rel=1e-14
    )


def test_what_does_not_fit_is_refused() -> None:
    twos, fours = turn(20, 50), turn(20, 50, group_size=4)
    for call in (
        lambda: interpolate(twos, fours, 0.5),
        lambda: subtract(twos, fours),
        lambda: mean([twos, fours]),
        lambda: squared_distance(twos, fours, Metric.CHORDAL),
    ):
        with pytest.raises(ConfigError, match=r"group_size .*2.*4.*share no pair"):
            call()
    with pytest.raises(AdapterError, match=r"out_features {'start': 4, 'end': 2}"):
        interpolate(twos, turn(20), 0.5)
    singular = Rotation(torch.zeros(4).double(), torch.zeros(4).double(), 2)
    for call in (lambda: subtract(twos, singular), lambda: interpolate(singular, twos, 0.5)):
        with pytest.raises(AdapterError, match="singular"):
            call()
    mirror = Rotation(torch.tensor([1.0, -1.0, 1, 1]).double(), torch.zeros(4).double(), 2)
    with pytest.raises(AdapterError, match="outputs 0 and 1: mirrored"):
        squared_distance(twos, mirror, Metric.GEODESIC)
    with pytest.raises(AdapterError, match="exponent nan"):
        interpolate(twos, twos, math.nan)
    for weights in ([1, -1], [0, 0], [math.inf, 1], [math.nan, 1], [1]):
        with pytest.raises(AdapterError, match="weights"):
            mean([twos, twos], weights)
    with pytest.raises(AdapterError, match="0 adapters or rotations"):
        shares(0, None)
    with pytest.raises(ConfigError, match="'chordal' or 'geodesic'"):
        Metric.parse("euclidean")


def test_small_turns_are_as_far_in_both_metrics() -> None:
    start = turn(*[20.0] * 8)
    end = compose(start, power(turn(*[1.0] * 8), 1e-3))
    root = [math.sqrt(squared_distance(start, end, metric) / 16) for metric in Metric]
    assert root == pytest.approx([math.radians(1e-3)] * 2, rel=1e-9)
