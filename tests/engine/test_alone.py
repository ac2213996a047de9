"""Thirty-two tenants of different variants, targets, group sizes and rates: each is, step by step, what it is alone."""

from __future__ import annotations

import pytest
import torch
from tests.engine.tenants import engine, gradients, row

import roadie
from roadie.engine import AdamSettings, TrainingEngine, TrainingRow
from roadie.testing.accuracy import unit_roundoff

NUM_TENANTS, STEPS = 32, 50
VARIANTS, SIZES = ("road_1", "road_2", "road_4"), (2, 8, 16)
TARGETS: tuple[str | list[str], ...] = ("all-linear", ["q_proj", "v_proj"], ["down_proj", "up_proj"], ["o_proj"])
OF_A_GRADIENT = (2**9 + 2**12) * unit_roundoff(torch.float32)  # as in test_training
OF_A_LOSS = 1e-3
"""Of losses after many steps: the two trainings round differently, and each step begins where the last one ended."""


def started(numbers: list[int]) -> TrainingEngine:
    made = engine()
    for number in numbers:
        settings = {"variant": VARIANTS[number % 3], "group_size": SIZES[number // 3 % 3]}
        config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules=TARGETS[number % 4], **settings)
        made.create(f"t{number}", config)
    return made


def rows_of(number: int, step: int) -> list[TrainingRow]:
    return [row(1000 * number + 3 * (step % 4) + each, 6 + (number + each) % 7) for each in range(1 + number % 3)]


def step(made: TrainingEngine, numbers: list[int], at: int) -> dict[int, float]:
    """One of all of them; their losses."""
    found = {number: made.forward_backward(f"t{number}", rows_of(number, at), "cross_entropy") for number in numbers}
    for number in numbers:
        made.optim_step(f"t{number}", AdamSettings(1e-3 * (1 + number % 8)))
    made.run()
    return {number: future.result().loss for number, future in found.items()}


def test_gradients_are_those_of_the_same_rows_alone() -> None:
    numbers = list(range(NUM_TENANTS))
    together = started(numbers)
    for at in range(3):  # so that parameters and gradients are no longer those of the identity
        step(together, numbers, at)
    states = {number: together.state(f"t{number}") for number in numbers}
    calls = [together.forward_backward(f"t{number}", rows_of(number, 3), "cross_entropy") for number in numbers]
    passes = together.figures.num_passes
    together.run()
    assert together.figures.num_passes == passes + 1
    for number in numbers:
        alone = engine()
        alone.create(f"t{number}", states[number].result())
        alone.run()
        assert alone.bank.family_of(f"t{number}").layers == together.bank.family_of(f"t{number}").layers
        loss = alone.forward_backward(f"t{number}", rows_of(number, 3), "cross_entropy")
        alone.run()
        assert loss.result().loss == pytest.approx(calls[number].result().loss, rel=1e-6)
        ours, theirs = gradients(together, f"t{number}"), gradients(alone, f"t{number}")
        norm = float(torch.stack([gradient.norm() for gradient in theirs]).norm())
        for one, other in zip(ours, theirs, strict=True):
            assert float((one - other).norm()) <= OF_A_GRADIENT * norm > 0


@pytest.mark.slow
def test_losses_of_many_steps_are_those_of_a_training_alone() -> None:
    numbers = list(range(NUM_TENANTS))
    together = started(numbers)
    losses = [step(together, numbers, at) for at in range(STEPS)]
    for number in numbers[::5]:
        alone = started([number])
        for at in range(STEPS):
            expected = step(alone, [number], at)[number]
            assert losses[at][number] == pytest.approx(expected, rel=OF_A_LOSS), (number, at)
        assert alone.figures.num_steps == STEPS
