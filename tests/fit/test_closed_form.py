"""The best block: against lstsq of dense rows, against what was planted, and where rows say nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from roadie.errors import ConfigError
from roadie.fit import Moments, best_rotation, closed_form, moments
from roadie.rotation import Rotation, from_parameters, parameter_size, rotate_weight, to_blocks

VARIANTS = ("road_1", "road_2", "road_4")
EPS = torch.finfo(torch.float64).eps


def planted(variant: str, outputs: int, group_size: int, spread: float = 0.5) -> Rotation:
    size = parameter_size(variant, outputs)
    theta, alpha = torch.randn(2, size, dtype=torch.float64) * spread
    return from_parameters(theta, 1 + alpha, variant, group_size)


def pairs_of(rows: Tensor, group_size: int) -> list[tuple[int, int]]:
    """First and second members, in the order of to_blocks, spelt out."""
    half = group_size // 2
    return [(g + k, g + k + half) for g in range(0, len(rows), group_size) for k in range(half)]


def errors(before: Tensor, after: Tensor, rotation: Rotation) -> float:
    return float((after - rotate_weight(before, rotation)).norm())


@given(st.sampled_from(VARIANTS), st.sampled_from([2, 4, 8]), st.integers(3, 40), st.integers(0, 10))
def test_a_planted_rotation_is_found(variant: str, group_size: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.randn(16, columns, dtype=torch.float64)
    rotation = planted(variant, 16, group_size)
    found = best_rotation(moments(before, rotate_weight(before, rotation), group_size), variant)
    for (i, j), wanted, got in zip(pairs_of(before, group_size), to_blocks(rotation), to_blocks(found), strict=True):
        values = torch.linalg.svdvals(before[[i, j]])
        # Least squares by second moments: rounding of the moments, times the square of the condition number.
        bound = 8 * columns * EPS * float(values[0] / values[1]) ** 2 * (1 + float(wanted.norm()))
        assert float((wanted - got).abs().max()) <= bound


@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_the_best_block_is_that_of_lstsq(group_size: int) -> None:
    before, after = torch.randn(2, 12, 9, dtype=torch.float64)
    blocks = to_blocks(best_rotation(moments(before, after, group_size), "road_2"))
    for (i, j), block in zip(pairs_of(before, group_size), blocks, strict=True):
        wanted = torch.linalg.lstsq(before[[i, j]].T, after[[i, j]].T).solution.T
        torch.testing.assert_close(block, wanted, rtol=1e-10, atol=1e-12)


def test_road_1_is_the_complex_least_squares() -> None:
    before, after = torch.randn(2, 12, 9, dtype=torch.float64)
    blocks = to_blocks(best_rotation(moments(before, after, 4), "road_1"))
    for (i, j), block in zip(pairs_of(before, 4), blocks, strict=True):
        h, z = torch.complex(before[i], before[j]), torch.complex(after[i], after[j])
        factor = torch.linalg.lstsq(h[:, None], z[:, None]).solution[0, 0]
        wanted = torch.stack((torch.stack((factor.real, -factor.imag)), torch.stack((factor.imag, factor.real))))
        torch.testing.assert_close(block, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rotation_nearby_is_better(variant: str) -> None:
    before, after = torch.randn(2, 8, 5, dtype=torch.float64)
    found = best_rotation(moments(before, after, 4), variant)
    least = errors(before, after, found)
    for _ in range(50):
        step = planted(variant, 8, 4, spread=1e-3)
        nearby = Rotation(found.direct + step.direct - 1, found.cross + step.cross, 4)
        assert errors(before, after, nearby) > least


def test_the_error_is_that_of_the_dense_product() -> None:
    before, after = torch.randn(2, 8, 5, dtype=torch.float64)
    found = moments(before, after, 4)
    for rotation in (planted("road_2", 8, 4), best_rotation(found, "road_1")):
        assert math.sqrt(found.squared_error(rotation)) == pytest.approx(errors(before, after, rotation), rel=1e-12)
    assert math.sqrt(found.squared_change) == pytest.approx(float((after - before).norm()), rel=1e-12)
    assert math.sqrt(found.squared_norm) == pytest.approx(float(before.norm()), rel=1e-12)


def test_by_hand() -> None:
    """A quarter turn and a doubling of the pair (1, 0), (0, 1): B = [[0, -2], [2, 0]]."""
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    for variant in VARIANTS:
        found = best_rotation(moments(before, after, 2), variant)
        assert (found.direct.tolist(), found.cross.tolist()) == ([0, 0], [2, 2])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_rows_of_zeros_stay_as_they_are(variant: str, ridge: float) -> None:
    before, after = torch.zeros(4, 6), torch.randn(4, 6)
    found = best_rotation(moments(before, after, 4), variant, ridge)
    assert (found.direct.tolist(), found.cross.tolist()) == ([1] * 4, [0] * 4)


def test_one_row_of_zeros_says_nothing_of_its_column() -> None:
    before = torch.stack((torch.randn(6), torch.zeros(6))).double()
    after = torch.stack((3 * before[0], -2 * before[0]))
    block = to_blocks(best_rotation(moments(before, after, 2), "road_2"))[0]
    torch.testing.assert_close(block, torch.tensor([[3, 0], [-2, 1]]).double(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e-3])
def test_parallel_rows_change_as_little_as_they_can(factor: float) -> None:
    """The pseudo-inverse of rows of length 1: both columns take part, and what can be explained is."""
    row = torch.randn(50, dtype=torch.float64)
    before = torch.stack((row, factor * row))
    found = best_rotation(moments(before, 1.5 * before, 2), "road_2")
    assert errors(before, 1.5 * before, found) <= 100 * EPS * float(before.norm())
    assert float((to_blocks(found)[0] - torch.eye(2)).abs().max()) <= 0.25 * max(abs(factor), 1 / abs(factor)) + 1e-9


def test_small_rows_count_as_large_ones_do() -> None:
    before = torch.randn(2, 20, dtype=torch.float64)
    rotation = planted("road_2", 2, 2)
    scaled = torch.tensor([[1.0], [1e-9]], dtype=torch.float64) * before
    after = rotate_weight(scaled, rotation)
    found = best_rotation(moments(scaled, after, 2), "road_2")
    torch.testing.assert_close(found.direct, rotation.direct, rtol=1e-6, atol=0)
    assert float((after - rotate_weight(scaled, found)).norm()) <= 1e-14 * float(after.norm())


def test_a_ridge_shrinks_the_change_and_nothing_else() -> None:
    before, after = torch.randn(2, 4, 30, dtype=torch.float64)
    norms = [
        float((to_blocks(best_rotation(moments(before, after, 2), "road_2", ridge)) - torch.eye(2)).norm())
        for ridge in (0.0, 0.1, 1.0, 1e12)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-10
    plain, half = (best_rotation(moments(before, after, 2), "road_1", ridge) for ridge in (0.0, 1.0))
    torch.testing.assert_close(half.direct - 1, (plain.direct - 1) / 2)
    torch.testing.assert_close(half.cross, plain.cross / 2)


@pytest.mark.parametrize("tile", [1, 7, 64, 2**19])
def test_tiles_make_no_difference(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.randn(2, 24, 13)
    whole = moments(before, after, 8)
    monkeypatch.setattr(closed_form, "TILE_ELEMENTS", tile)
    seen = torch.zeros(24, 13)
    for rows, columns in closed_form.tiling(24, 13, 8):
        seen[rows, columns] += 1
        assert rows.start % 8 == 0
    assert bool((seen == 1).all())
    torch.testing.assert_close(moments(before, after, 8).gram, whole.gram, rtol=1e-13, atol=1e-13)
    assert moments(before, after, 8).columns == 13


def test_moments_add_up_over_columns() -> None:
    before, after = torch.randn(2, 8, 10, dtype=torch.float64)
    parts = moments(before[:, :3], after[:, :3], 4) + moments(before[:, 3:], after[:, 3:], 4)
    torch.testing.assert_close(parts.gram, moments(before, after, 4).gram)
    assert parts.columns == 10


def test_nothing_cancels_where_little_changes() -> None:
    """A change of 1e-13 of a weight is found to as many digits as float64 leaves it."""
    before = torch.randn(4, 200, dtype=torch.float64)
    after = before * (1 + 2.0**-43)
    change = ((after - before) / before).mean(1)
    found = best_rotation(moments(before, after, 4), "road_1")
    assert float(((found.direct - 1) / change[:4].mean() - 1).abs().max()) < 2e-3


def test_a_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="divisible by group_size"):
        moments(torch.zeros(6, 2), torch.zeros(6, 2), 4)


def test_infinite_rows_are_seen() -> None:
    for bad in (math.inf, math.nan):
        rows = torch.ones(2, 3)
        rows[1, 2] = bad
        assert not moments(rows, torch.ones(2, 3), 2).is_finite
    assert moments(torch.ones(2, 3), torch.ones(2, 3), 2).is_finite
    assert isinstance(moments(torch.ones(2, 3), torch.ones(2, 3), 2), Moments)
