"""How many functions of roadie run for one adapted layer, and how many once a step: bounds that follow the code down.

A layer's calls are counted twice: from its own forward on, in a model of one layer; and as the slope between models of one and
of nine layers, so that nothing is hidden by being done before the first layer: that is in the intercept. All with the compiled
kernel; where there is none other functions run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from tests.architecture.hops import SCENARIOS, codes_run_by, files_of, from_the_layer_on, told
from tests.kernels.cases import needs_compiled_kernel

import roadie

FEW, MANY = 1, 9
SLACK = 0.1
"""How far below its bound a count may lie, as a share of it."""


@dataclass(frozen=True)
class Limit:
    """What a count may be today, and what it is to become."""

    bound: int
    target: int


LIMITS = {
    ("first_inference", "calls"): Limit(bound=25, target=60),
    ("first_inference", "files"): Limit(bound=7, target=8),
    ("first_inference", "slope"): Limit(bound=57, target=60),
    ("first_inference", "intercept"): Limit(bound=47, target=40),
    ("repeated_inference", "calls"): Limit(bound=3, target=4),
    ("repeated_inference", "files"): Limit(bound=2, target=4),
    ("repeated_inference", "slope"): Limit(bound=2, target=4),
    ("repeated_inference", "intercept"): Limit(bound=8, target=40),
    ("training", "calls"): Limit(bound=29, target=30),
    ("training", "files"): Limit(bound=11, target=6),
    ("training", "slope"): Limit(bound=25, target=30),
    ("training", "intercept"): Limit(bound=39, target=40),
    ("training_on", "calls"): Limit(bound=29, target=30),
    ("training_on", "files"): Limit(bound=11, target=6),
    ("training_on", "slope"): Limit(bound=25, target=30),
    ("training_on", "intercept"): Limit(bound=40, target=40),
    ("two_stages_training", "calls"): Limit(bound=31, target=30),
    ("two_stages_training", "files"): Limit(bound=11, target=6),
    ("two_stages_training", "slope"): Limit(bound=31, target=30),
    ("two_stages_training", "intercept"): Limit(bound=51, target=40),
    ("mixed_inference", "calls"): Limit(bound=28, target=30),
    ("mixed_inference", "files"): Limit(bound=8, target=8),
    ("mixed_inference", "slope"): Limit(bound=20, target=30),
    ("mixed_inference", "intercept"): Limit(bound=78, target=40),
    ("mixed_training", "calls"): Limit(bound=46, target=60),
    ("mixed_training", "files"): Limit(bound=13, target=8),
    ("mixed_training", "slope"): Limit(bound=32, target=60),
    ("mixed_training", "intercept"): Limit(bound=105, target=40),
}


@dataclass(frozen=True)
class Counted:
    """The counts of a scenario by what they count, and all calls of a step of the model of one layer."""

    counts: dict[str, float]
    calls: str


@cache
def counted(scenario: str) -> Counted:
    SCENARIOS[scenario](FEW)()  # what is done once a process is no layer's
    few, many = (codes_run_by(SCENARIOS[scenario](layers)) for layers in (FEW, MANY))
    of_a_layer = from_the_layer_on(few)
    slope = (len(many) - len(few)) / (MANY - FEW)
    counts = {"calls": len(of_a_layer), "files": len(files_of(of_a_layer))}
    return Counted({**counts, "slope": slope, "intercept": len(few) - FEW * slope}, told(few))


def verdict(count: float, limit: Limit) -> str | None:
    """What is to be done where a count is not what its limit says; None where it is."""
    if count > limit.bound:
        return f"got {count:g}; wanted at most {limit.bound}, and in the end {limit.target}"
    if count < (1 - SLACK) * limit.bound:
        return f"got {count:g}, which is well below its bound of {limit.bound}: lower the bound"
    return None


@needs_compiled_kernel
@pytest.mark.parametrize(("scenario", "measure"), LIMITS, ids=str)
def test_so_many_functions_run(scenario: str, measure: str) -> None:
    found = counted(scenario)
    why = verdict(found.counts[measure], LIMITS[scenario, measure])
    assert why is None, f"{why}. A step of a model of one layer:\n{found.calls}"


def test_every_scenario_is_limited_in_every_way() -> None:
    assert set(LIMITS) == {
        (each, measure) for each in SCENARIOS for measure in ("calls", "files", "slope", "intercept")
    }


@pytest.mark.parametrize(
    ("count", "why"), [(101, "at most 100"), (100, None), (90, None), (89.9, "lower the bound"), (0, "lower the bound")]
)
def test_a_count_is_neither_above_its_bound_nor_well_below(count: float, why: str | None) -> None:
    said = verdict(count, Limit(bound=100, target=10))
    assert said is None if why is None else why in said


def test_what_is_counted() -> None:
    """Functions of roadie and of nobody else, each time; and whoever watched before goes on watching."""
    rotation = roadie.identity(8, 4)

    def step() -> None:
        for _ in range(2):
            roadie.rotate(torch.ones(3, 8), rotation)

    watch = sys.getprofile()
    codes = codes_run_by(step)
    assert sys.getprofile() is watch
    assert codes.count(roadie.rotate.__code__) == 2
    assert {code.co_filename for code in codes} <= {roadie.__file__, roadie.rotate.__code__.co_filename}
