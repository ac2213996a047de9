"""The laws of powers and blends, for shapes, variants and group sizes that hypothesis chooses, and values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws import algebra as algebra_laws

from roadie.algebra import blend, logarithm, power
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, compose, determinant, from_parameters, parameter_size, swap_unsigned

VARIANTS = ("road_1", "road_2", "road_4")
SIZES = (2, 4, 16)


# Up to eight functions and products in a row, each off by a unit in the last place: other processors' libraries round otherwise.
FEW_ULPS = 8 * 2.0**-52


def make(variant: str, group_size: int, groups: int, seed: int, spread: float = 1.0) -> Rotation:
    """Random parameters as training might leave them: angles of about `spread`, alphas of 1 +- 0.3 spread."""
    generator = torch.Generator().manual_seed(seed)
    n = parameter_size(variant, groups * group_size)
    theta, alpha = torch.randn(2, n, generator=generator, dtype=torch.float64) * spread
    return from_parameters(theta, 1 + 0.3 * alpha, variant, group_size)


def with_logarithm(rotation: Rotation) -> Rotation:
    """The same with a row negated where the determinant is negative, and both where the block has negative eigenvalues."""
    size = rotation.group_size
    first = torch.arange(rotation.out_features) % size < size // 2
    sign = torch.where((determinant(rotation) < 0) & first, -1.0, 1.0).double()
    direct, cross = sign * rotation.direct, sign * rotation.cross
    middle, deviation = (direct + swap_unsigned(direct, size)) / 2, (direct - swap_unsigned(direct, size)) / 2
    stretches = deviation.square() >= cross * swap_unsigned(cross, size)
    sign = torch.where(stretches & (middle < 0), -1.0, 1.0).double()
    return Rotation(sign * direct, sign * cross, size)


def several(count: int) -> st.SearchStrategy[list[Rotation]]:
    """Rotations of one shape with logarithms, from near the identity to large."""
    return st.builds(
        lambda variants, size, groups, seed, spread: [
            with_logarithm(make(variant, size, groups, seed + i, spread)) for i, variant in enumerate(variants)
        ],
        st.tuples(*[st.sampled_from(VARIANTS)] * count),
        st.sampled_from(SIZES),
        st.integers(1, 3),
        st.integers(0, 1000),
        st.sampled_from((1e-9, 1e-3, 0.3, 1.0, 3.0)),
    )


one = several(1).map(lambda rotations: rotations[0])
eighths = st.integers(-20, 20).map(lambda n: n / 8)  # so that sums of exponents are exact


@settings(max_examples=60)
@given(one)
def test_the_exponential_of_the_logarithm_is_the_block(rotation: Rotation) -> None:
    algebra_laws.check_logarithm(rotation)


@settings(max_examples=40)
@given(one, st.floats(-3, 3))
def test_a_power_is_that_of_dense_matrices(rotation: Rotation, exponent: float) -> None:
    algebra_laws.check_power(rotation, exponent)


@pytest.mark.slow
@settings(max_examples=100)
@given(
    st.floats(0.2, 10),
    st.floats(-3, 3),
    st.sampled_from((1e-6, 0.01, 1.0, 30.0)),
    st.sampled_from((-1, 0, 1)),
    st.integers(-20, -2),
)
def test_nearly_equal_eigenvalues(middle: float, deviation: float, cross: float, sign: int, exponent: int) -> None:
    """Where turns become shears and shears become stretches nothing jumps: eigenvalues t +- sqrt(d), d from -1e-2 to 1e-2."""
    lower = (deviation**2 - sign * 10.0**exponent) / cross
    rotation = one_block([[middle + deviation, -cross], [lower, middle - deviation]])
    algebra_laws.check_logarithm(rotation)
    algebra_laws.check_power(rotation, 0.7)
    algebra_laws.check_exponents_add(rotation, 0.5, -1.25)


@settings(max_examples=40)
@given(one, eighths, eighths)
def test_exponents_add(rotation: Rotation, first: float, second: float) -> None:
    algebra_laws.check_exponents_add(rotation, first, second)


@settings(max_examples=40)
@given(st.sampled_from(VARIANTS), st.sampled_from(SIZES), st.integers(0, 1000), st.integers(-4, 9))
def test_integer_powers_multiply_blocks_with_or_without_logarithm(variant, size, seed, exponent) -> None:
    algebra_laws.check_integer_power(make(variant, size, 3, seed), exponent)


@settings(max_examples=25)
@given(st.sampled_from(VARIANTS), st.sampled_from(SIZES), st.integers(0, 1000))
def test_the_powers_one_and_minus_one_are_the_rotation_and_its_inverse(variant, size, seed) -> None:
    algebra_laws.check_one_and_minus_one(make(variant, size, 3, seed))


@settings(max_examples=25)
@given(one, st.one_of(eighths, st.floats(-3, 3)))
def test_a_blend_of_one_is_a_power(rotation: Rotation, weight: float) -> None:
    algebra_laws.check_a_blend_of_one_is_a_power(rotation, weight)


@settings(max_examples=40)
@given(several(3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_a_blend_is_that_of_dense_matrices_in_any_order(rotations: list[Rotation], weights: list[float]) -> None:
    algebra_laws.check_blend(rotations, weights)


@settings(max_examples=40)
@given(one, eighths, eighths)
def test_weights_of_commuting_blocks_add(rotation: Rotation, first: float, second: float) -> None:
    algebra_laws.check_commuting_weights_add(rotation, first, second)


@settings(max_examples=60)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.sampled_from(SIZES),
    st.integers(0, 1000),
    st.sampled_from((0.0, 1e-9, 1e-3)),
)
def test_blends_of_road_1_are_the_closed_form(weights, size, seed, distance) -> None:
    """Angles anywhere in the principal branch, or `distance` from the half turn at its end."""
    generator = torch.Generator().manual_seed(seed)
    theta, alpha = torch.rand(2, len(weights), size, generator=generator, dtype=torch.float64)
    theta = math.pi - distance * theta if distance else math.pi * (2 * theta - 1)
    algebra_laws.check_closed_form(theta, 0.1 + 2 * alpha, weights, size)


def test_blends_of_road_1_are_products() -> None:
    first, second = make("road_1", 4, 3, 0), make("road_1", 4, 3, 1)
    together = blend([first, second], [1.0, 1.0])
    torch.testing.assert_close(together.direct, compose(first, second).direct, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(together.cross, compose(first, second).cross, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotations_in_float32_and_tables_give_float64(variant: str) -> None:
    rotation = with_logarithm(make(variant, 4, 2, 0, 0.3))
    narrow = Rotation(rotation.direct.float(), rotation.cross.float(), 4)
    half = power(narrow, 0.5)
    assert half.direct.dtype == half.cross.dtype == torch.float64
    table = power(Rotation(narrow.direct.expand(3, 1, 8), narrow.cross.expand(3, 1, 8), 4), 0.5)
    assert table.direct.shape == (3, 1, 8)
    assert torch.equal(table.direct[2, 0], half.direct)
    assert torch.equal(blend([narrow, narrow], [0.0, 0.0]).direct, torch.ones(8, dtype=torch.float64))


def one_block(rows: list[list[float]]) -> Rotation:
    (a, b), (c, d) = rows
    return Rotation(torch.tensor([a, d], dtype=torch.float64), torch.tensor([-b, c], dtype=torch.float64), 2)


EIGHTH = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("block", "exponent", "wanted"),
    [
        (
            [[0, -1], [1, 0]],
            0.5,
            [[EIGHTH, -EIGHTH], [EIGHTH, EIGHTH]],
        ),  # a quarter turn: half of it, the same way round
        ([[0, 1], [-1, 0]], 0.5, [[EIGHTH, EIGHTH], [-EIGHTH, EIGHTH]]),
        ([[0, -1], [1, 0]], 3.0, [[0, 1], [-1, 0]]),
        ([[-1, 0], [0, -1]], 0.5, [[0, -1], [1, 0]]),  # a half turn is one by +pi
        ([[-4, 0], [0, -4]], -0.5, [[0, 0.5], [-0.5, 0]]),
        ([[1, 1], [0, 1]], 0.25, [[1, 0.25], [0, 1]]),  # shears
        ([[1, 0], [-6, 1]], -0.5, [[1, 0], [3, 1]]),
        ([[3, -2], [2, -1]], 0.5, [[2, -1], [1, 0]]),
        ([[4, 0], [0, 1 / 9]], 0.5, [[2, 0], [0, 1 / 3]]),  # stretches
        ([[5, 4], [4, 5]], 0.5, [[2, 1], [1, 2]]),
        ([[7, 2], [3, 6]], 0.5, [[2.6, 0.4], [0.6, 2.4]]),  # eigenvalues 9 and 4
        ([[0, -2], [1, 0]], 2, [[-2, 0], [0, -2]]),
        ([[1, 0], [0, -1]], -3, [[1, 0], [0, -1]]),  # no logarithm, and none needed
        ([[2, 4], [1, 2]], 3, [[32, 64], [16, 32]]),
        ([[2, 4], [1, 2]], 0, [[1, 0], [0, 1]]),
        ([[1, 0], [0, 1]], 0.3, [[1, 0], [0, 1]]),
    ],
)
def test_powers_worked_out_by_hand(block, exponent, wanted) -> None:
    got, expected = power(one_block(block), exponent), one_block(wanted)
    torch.testing.assert_close(got.direct, expected.direct, rtol=FEW_ULPS, atol=4e-16)
    torch.testing.assert_close(got.cross, expected.cross, rtol=FEW_ULPS, atol=4e-16)


def test_blends_worked_out_by_hand() -> None:
    """Two shears do not commute: exp [[0, 1], [1, 0]]. A third of a quarter turn and two of a half turn: 150 degrees."""
    shears = blend([one_block([[1, 1], [0, 1]]), one_block([[1, 0], [1, 1]])], [1.0, 1.0])
    wanted = one_block([[math.cosh(1), math.sinh(1)], [math.sinh(1), math.cosh(1)]])
    torch.testing.assert_close(shears.direct, wanted.direct, rtol=FEW_ULPS, atol=0)
    torch.testing.assert_close(shears.cross, wanted.cross, rtol=FEW_ULPS, atol=0)
    turns = blend([one_block([[0, -1], [1, 0]]), one_block([[-1, 0], [0, -1]])], [1 / 3, 2 / 3])
    torch.testing.assert_close(
        turns.direct, torch.full((2,), -math.sqrt(0.75), dtype=torch.float64), rtol=FEW_ULPS, atol=0
    )
    torch.testing.assert_close(turns.cross, torch.full((2,), 0.5, dtype=torch.float64), rtol=FEW_ULPS, atol=0)


def test_the_logarithm_worked_out_by_hand() -> None:
    generator = logarithm(Rotation(torch.zeros(8), torch.full((8,), 2.0), 4))
    torch.testing.assert_close(
        generator.direct, torch.full((8,), math.log(2), dtype=torch.float64), rtol=FEW_ULPS, atol=0
    )
    torch.testing.assert_close(
        generator.cross, torch.full((8,), math.pi / 2, dtype=torch.float64), rtol=FEW_ULPS, atol=0
    )


def test_stretches_keep_their_small_eigenvalue() -> None:
    """Each entry is right, not only the large ones; and no number overflows on the way."""
    root = power(one_block([[1e20, 0], [0, 1e-20]]), 0.5)
    torch.testing.assert_close(root.direct, torch.tensor([1e10, 1e-10], dtype=torch.float64), rtol=1e-14, atol=0)
    small = power(one_block([[1, 0], [0, 1e-150]]), 3.5)
    wanted = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(small.direct, wanted, rtol=1e-12, atol=0)  # a logarithm of 1200, rounded: 3e-13
    turned = power(
        Rotation(torch.full((2,), -1.0, dtype=torch.float64), torch.full((2,), -1e-200, dtype=torch.float64), 2), 0.5
    )
    torch.testing.assert_close(turned.cross, torch.full((2,), -1.0, dtype=torch.float64), rtol=FEW_ULPS, atol=0)


WITHOUT_LOGARITHM = {
    "a mirror": ([[1, 0], [0, -1]], "mirrored, determinant -1"),
    "singular": ([[2, 4], [1, 2]], "singular, determinant 0"),
    "singular but for rounding": ([[0.1, 0.3], [0.7, 2.1]], "singular"),
    "zero": ([[0, 0], [0, 0]], "singular, determinant 0"),
    "two negative stretches": ([[-1, 0], [0, -2]], "two negative eigenvalues, determinant 2"),
    "a shear turned by half": ([[-1, 1], [0, -1]], "two negative eigenvalues, determinant 1"),
    "not a number": ([[math.nan, 0], [0, 1]], "not finite"),
    "infinite": ([[1, 0], [math.inf, 1]], "not finite"),
    "too large for its determinant": ([[1e200, 0], [0, 1e200]], "too large, determinant inf"),
}


@pytest.mark.parametrize("name", WITHOUT_LOGARITHM)
def test_blocks_without_logarithm_are_refused_with_their_outputs(name: str) -> None:
    block, reason = WITHOUT_LOGARITHM[name]
    bad, good = one_block(block), one_block([[1, 0], [0, 1]])
    # The third pair of two groups of four: outputs 4 and 6.
    direct, cross = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    direct[[4, 6]], cross[[4, 6]] = bad.direct, bad.cross
    says = rf"got .*outputs 4 and 6.*{reason}" if "finite" not in reason else r"not finite \(outputs 4 and 6\)"
    with pytest.raises(AdapterError, match=says):
        power(Rotation(direct, cross, 4), 0.5)
    with pytest.raises(AdapterError, match=rf"^rotation 1 of 2: got .*{reason}"):
        blend([good, bad], [0.5, 1.0])
    with pytest.raises(AdapterError, match=rf"^terse: got .*{reason}"):
        blend([good, bad], [0.0, 0.5], names=["legal", "terse"])
    assert torch.equal(blend([good, bad], [1.0, 0.0]).direct, good.direct)


def test_numbers_that_do_not_fit_are_refused() -> None:
    rotation = make("road_1", 4, 1, 0)
    for weight in (math.nan, math.inf, -math.inf):
        with pytest.raises(AdapterError, match="wanted a finite number"):
            power(rotation, weight)
        with pytest.raises(AdapterError, match="wanted finite numbers"):
            blend([rotation, rotation], [0.0, weight])
    with pytest.raises(AdapterError, match="2 rotations and 1 weights"):
        blend([rotation, rotation], [1.0])
    with pytest.raises(AdapterError, match="0 rotations"):
        blend([], [])
    with pytest.raises(ConfigError, match=r"group sizes \[2, 4\].*train the adapters with one group_size"):
        blend([rotation, make("road_1", 2, 2, 0)], [1.0, 1.0])
    with pytest.raises(AdapterError, match=r"\[4, 8\] outputs"):
        blend([rotation, make("road_1", 4, 2, 0)], [1.0, 1.0])


def test_results_too_large_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"power 2000.5 of a block that is not finite \(outputs 0 and 1\)"):
        power(one_block([[2, 0], [0, 1]]), 2000.5)
    with pytest.raises(AdapterError, match="power 2000 of a block that is not finite"):
        power(one_block([[2, 0], [0, 1]]), 2000)
    with pytest.raises(AdapterError, match="singular"):
        power(one_block([[2, 4], [1, 2]]), -1)
    with pytest.raises(AdapterError, match=r"weights \[800, 800\].*use smaller weights"):
        blend([one_block([[2, 0], [0, 2]])] * 2, [800, 800])


anything = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(anything, min_size=8, max_size=8), st.one_of(anything, st.integers(-9, 9)), st.floats(-2, 2))
def test_a_result_is_finite_or_refused(values: list[float], weight: float, other: float) -> None:
    first, second = one_block([values[0:2], values[2:4]]), one_block([values[4:6], values[6:8]])
    for make_it in (lambda: power(first, weight), lambda: blend([first, second], [weight, other])):
        try:
            result = make_it()
        except AdapterError:
            continue
        assert bool(torch.isfinite(result.direct).all() & torch.isfinite(result.cross).all())
