"""AdamW for many adapters is torch's AdamW for each, and the schedules are transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from roadie.bank.families import AdaptedLayer, Family
from roadie.engine import AdamSettings, optimiser
from roadie.errors import ConfigError
from roadie.rotation import Variant
from roadie.training.many.schedule import learning_rate
from roadie.training.recipe import Recipe

LAYERS = [
    AdaptedLayer("a", 16, Variant.ROAD_1, (8,)),
    AdaptedLayer("b", 32, Variant.ROAD_1, (8,)),
    AdaptedLayer("c", 16, Variant.ROAD_1, (8,)),
]
SETTINGS = [
    {"lr": 3e-3, "weight_decay": 0.0, "clip": 1.0, "begins": 0},
    {"lr": 1e-1, "weight_decay": 0.3, "clip": 0.0, "begins": 0, "betas": (0.8, 0.95), "eps": 1e-12},
    {"lr": 1e-2, "weight_decay": 0.01, "clip": 0.2, "begins": 3},
]
STEPS = 12


def family() -> Family:
    made = Family(LAYERS, torch.device("cpu"))
    made.add("xy")
    made.add("z")
    return made


def own_copies(made: Family) -> list[list[torch.nn.Parameter]]:
    return [[torch.nn.Parameter(tensor.double()) for tensor in made.row(name)] for name in made.names]


def test_each_adapter_moves_as_with_torch_alone():
    made = family()
    copies = own_copies(made)
    optimisers = [
        torch.optim.AdamW(
            copy,
            lr=one["lr"],
            weight_decay=one["weight_decay"],
            betas=one.get("betas", (0.9, 0.999)),
            eps=one.get("eps", 1e-8),
        )
        for copy, one in zip(copies, SETTINGS, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for stack in made.stacks:
            stack.gradients.normal_(generator=generator)
        given = [[stack.gradients[:, :, slot].double() for stack in made.stacks] for slot in range(3)]
        squares = sum(stack.gradients.square().sum(dim=(0, 1, 3)) for stack in made.stacks)
        settings = [
            AdamSettings(
                one["lr"] * (step >= one["begins"]),
                one["weight_decay"],
                one["clip"],
                *one.get("betas", (0.9, 0.999)),
                one.get("eps", 1e-8),
            )
            for one in SETTINGS
        ]
        optimiser.step(made, settings, [step + 1] * 3, squares)
        for copy, gradients, rule, one in zip(copies, given, optimisers, SETTINGS, strict=True):
            for parameter, gradient in zip(copy, gradients, strict=True):
                parameter.grad = gradient.clone()
            if one["clip"]:
                torch.nn.utils.clip_grad_norm_(copy, one["clip"])
            rule.param_groups[0]["lr"] = one["lr"] * (step >= one["begins"])
            rule.step()
    for name, copy in zip(made.names, copies, strict=True):
        for found, expected in zip(made.row(name), copy, strict=True):
            assert found.dtype == torch.float32
            # float32 against float64: each of STEPS steps rounds a few times
            assert torch.allclose(found.double(), expected.detach(), rtol=0, atol=STEPS * 8 * 2**-24)
            assert not torch.equal(found[:, 0], torch.zeros_like(found[:, 0]))


def test_one_adapter_that_is_not_finite_stays_alone():
    alone, together = family(), family()
    for made in (alone, together):
        for stack in made.stacks:
            stack.gradients.fill_(0.5)
    for stack in together.stacks:
        stack.gradients[:, :, 1] = float("nan")
    for made in (alone, together):
        squares = sum(stack.gradients.square().sum(dim=(0, 1, 3)) for stack in made.stacks)
        optimiser.step(made, [AdamSettings(0.1, 0.1, 1.0)] * 3, [1] * 3, squares)
    for name in "xz":
        assert all(map(torch.equal, alone.row(name), together.row(name)))
    assert all(tensor.isnan().all() for tensor in together.row("y"))


def test_some_of_a_family_move_as_all_would_and_the_others_stay():
    some, whole = family(), family()
    for made in (some, whole):
        generator = torch.Generator().manual_seed(1)
        for stack in made.stacks:
            stack.gradients.normal_(generator=generator)
    settings = [AdamSettings(0.1), AdamSettings(0.2, 0.1, 0.5), AdamSettings(0.3)]
    rows = [0, 2]
    optimiser.step(whole, settings, [1, 4, 7], optimiser.squared_norms(whole, range(3)))
    squares = optimiser.squared_norms(some, rows)
    optimiser.step(some, [settings[row] for row in rows], [1, 7], squares, rows)
    for name in "xz":
        assert all(map(torch.equal, some.row(name), whole.row(name)))
    assert all(map(torch.equal, some.row("y"), family().row("y")))
    assert not any(map(torch.equal, some.row("z"), family().row("z")))


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": -1.0}, {"beta1": 1.0}, {"eps": float("nan")}, {"weight_decay": True}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=f"got {next(iter(wrong))}="):
        AdamSettings(**{"learning_rate": 0.1, **wrong})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 40), (0.0, 7), (0.99, 5), (0.1, 1)])
def test_the_learning_rate_is_that_of_transformers(schedule, ratio, steps):
    recipe = Recipe(schedule=schedule, warmup_ratio=ratio, learning_rate=0.02)
    parameter = torch.nn.Parameter(torch.zeros(1))
    rule = torch.optim.AdamW([parameter], lr=0.02)
    warmup = min(-(-int(ratio * steps * 1000) // 1000), steps - 1)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, rule, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert learning_rate(recipe, step, steps) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        rule.step()
        theirs.step()


def test_leaving_and_joining_keep_the_others():
    made = family()
    for stack in made.stacks:
        for tensor in stack.tensors.values():
            tensor.normal_()
    before = {name: made.row(name) for name in "xz"}
    made.keep(["x", "z"])
    made.add(["new"])
    assert made.names == ["x", "z", "new"]
    assert all(map(torch.equal, before["z"], made.row("z")))
    assert all(row[:, 0].eq(0).all() and row[:, 1].eq(1).all() for row in made.row("new"))
    assert all(stack.exp_avg[:, :, 2].eq(0).all() for stack in made.stacks)
