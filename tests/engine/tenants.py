"""What the tests of the training engine share: a tiny model, tenants of all kinds, rows, and each tenant alone in float64."""

from __future__ import annotations

from typing import Any

import torch

import roadie
from roadie.engine import TrainingEngine, TrainingRow, TrainingSettings
from roadie.testing import tiny_llama

KINDS = (
    {"variant": "road_1", "group_size": 16, "target_modules": "all-linear"},
    {"variant": "road_2", "group_size": 8, "target_modules": ["q_proj", "v_proj"]},
    {"variant": "road_4", "group_size": 4, "target_modules": "all-linear"},
    {"variant": "road_1", "group_size": 2, "target_modules": ["down_proj"], "input_stages": [8]},
    {"variant": "road_2", "stages": [2, 8], "target_modules": ["o_proj", "up_proj"]},
    {"variant": "road_1", "group_size": 16, "target_modules": "all-linear"},
)
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "given")


def config(number: int) -> roadie.RoadConfig:
    return roadie.RoadConfig(task_type="CAUSAL_LM", **KINDS[number % len(KINDS)])


def row(seed: int, length: int, loss: str = "cross_entropy", vocabulary: int = 128) -> TrainingRow:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (length + 1,), generator=generator)

    def floats(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(length, generator=generator)

    values: dict[str, Any] = {"weights": floats().abs() * (torch.arange(length) >= length // 3)}
    if loss == "given":
        values = {"gradients": floats()}
    elif loss != "cross_entropy":  # near the logprobs of a model that knows nothing
        values |= {"advantages": floats(), "logprobs": floats(0.2) - 4.85}
    return TrainingRow(tokens[:-1], tokens[1:], **values)


def engine(model: Any = None, **settings: Any) -> TrainingEngine:
    return TrainingEngine(tiny_llama() if model is None else model, TrainingSettings(**settings))


def filled(made: TrainingEngine, *names: str) -> None:
    """Make the parameters of tenants random, and far from the identity; equal for equal names."""
    made.run()
    for name in names:
        family = made.bank.family_of(name)
        index = family.names.index(name)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        for stack in family.stacks:
            values = torch.randn(stack.parameters[:, :, index].shape, generator=generator)
            stack.parameters[:, :, index] = 0.1 * values + torch.tensor([0.0, 1.0]).view(1, 2, 1)


def gradients(made: TrainingEngine, name: str) -> list[torch.Tensor]:
    """Those of a tenant, by stack."""
    family = made.bank.family_of(name)
    return [stack.gradients[:, :, family.names.index(name)].clone() for stack in family.stacks]


def parameters(made: TrainingEngine, name: str) -> list[torch.Tensor]:
    return made.bank.family_of(name).row(name)
