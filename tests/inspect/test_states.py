"""dM and dD by hand."""

from __future__ import annotations

import math

import pytest
import torch

from roadie.errors import AdapterError
from roadie.inspect import change_of_states, summarise_states


def test_by_hand():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    after = torch.tensor([[6.0, 8.0], [0.0, 1.0], [-1.0, 0.0]])
    length, direction = change_of_states(before, after)
    assert length.tolist() == [1.0, 0.0, 0.5]
    assert direction.tolist() == [1.0, 0.0, -1.0]
    assert length.dtype == direction.dtype == torch.float64


def test_half_precision_is_measured_in_double():
    before = torch.full((4096,), 200.0, dtype=torch.float16)
    length, direction = change_of_states(before, 2 * before)  # the sum of squares would overflow float16
    assert (float(length), float(direction)) == (1.0, pytest.approx(1.0, abs=1e-15))


def test_a_state_of_length_zero_has_no_direction():
    length, direction = change_of_states(torch.zeros(2), torch.ones(2))
    assert math.isnan(length)
    assert math.isnan(direction)


def test_shapes_must_agree():
    with pytest.raises(AdapterError, match=r"got hidden states \(2, 3\) before and \(2, 4\) after"):
        change_of_states(torch.zeros(2, 3), torch.zeros(2, 4))


def test_the_summary_is_over_all_tokens_of_all_texts():
    parts = [(torch.tensor([[0.0, 0.1]]), torch.tensor([[1.0, 0.8]])), (torch.tensor([[0.5]]), torch.tensor([[0.0]]))]
    summary = summarise_states("it", [tuple(each.double() for each in part) for part in parts])
    (place,) = summary.places
    assert (summary.tokens, place.place) == (3, 0)
    assert place.length == pytest.approx(0.2)
    assert place.direction == pytest.approx(0.6)
    assert place.length_quantiles == pytest.approx((0.02, 0.1, 0.42))
    assert place.direction_quantiles == pytest.approx((0.16, 0.8, 0.96))


def test_states_that_are_no_numbers_are_left_out_and_none_left_is_an_error():
    nan = torch.tensor([[math.nan, 0.2]]).double()
    assert summarise_states("it", [(nan, nan)]).places[0].length == pytest.approx(0.2)
    with pytest.raises(AdapterError, match="it: got hidden states at place 0 that are 0 or not finite"):
        summarise_states("it", [(nan[:, :1], nan[:, :1])])
