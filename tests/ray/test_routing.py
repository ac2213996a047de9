"""Load first, then adapters."""

from __future__ import annotations

import random
from collections import Counter

import pytest

pytest.importorskip("ray", reason="needs Ray, which has an environment of its own: make test-ray")

from roadie.ray.routing import Standing, cost, names_of, ranked


def test_the_least_loaded_replica_comes_first_and_an_adapter_is_worth_two_requests() -> None:
    has, lacks = frozenset({"legal", "terse"}), frozenset({"terse"})
    for busy, wanted in ((0, "a"), (1, "a"), (2, None), (3, "b"), (30, "b")):
        order = ranked({"a": Standing(busy, has), "b": Standing(0, lacks)}, ("legal",), random.Random(0))
        assert wanted in (None, order[0]), busy
    assert cost(Standing(3, lacks), ("terse",)) == 3
    assert cost(Standing(3, lacks), ("terse", "legal")) == 5
    assert cost(Standing(None, lacks), ()) == 0


def test_equal_ones_take_turns() -> None:
    draw = random.Random(0)
    standings = {name: Standing(1, ()) for name in "abc"}
    firsts = Counter(ranked(standings, (), draw)[0] for _ in range(600))
    assert set(firsts) == set("abc")
    assert min(firsts.values()) > 120  # of 200 wanted each: 7 deviations


def test_a_blend_needs_all_its_adapters_and_what_is_no_wish_none() -> None:
    assert names_of(None) == ()
    assert names_of("legal") == ("legal",)
    assert sorted(names_of({"legal": 0.5, "terse": 0.5})) == ["legal", "terse"]
    assert names_of({"legal": float("nan")}) == ()
