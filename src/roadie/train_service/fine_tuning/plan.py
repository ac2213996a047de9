"""What a job is told: its hyperparameters, its adapter's settings, and its model's name.

"auto" is roadie's recipe (`roadie.training.recipe`): its epochs, its batches, of which an epoch has eight at least, its beta, and
the learning rate that follows the model's width and the data, which `learning_rate_multiplier` multiplies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roadie.engine import AdamSettings
from roadie.errors import ConfigError
from roadie.serving.places import MAX_NAME_CHARS
from roadie.training.many.data import Order
from roadie.training.many.schedule import learning_rate
from roadie.training.recipe import DEFAULT_BETA, VARIANTS, Recipe

LEAST_STEPS = 8
SETTINGS = ("road_variant", "road_group_size", "road_targets")
"""Keys of a job's metadata that say how its adapter is made."""
_CHECKPOINT = ":ckpt-step-"


def decided(hyperparameters: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Hyperparameters without "auto"."""
    recipe = Recipe()
    own = {
        "n_epochs": math.ceil(recipe.epochs),
        "batch_size": max(1, min(recipe.batch_size, num_rows // LEAST_STEPS)),
        "learning_rate_multiplier": 1.0,
        "beta": DEFAULT_BETA,
    }
    return {name: own[name] if value == "auto" else value for name, value in hyperparameters.items()}


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of a job over so many rows, by decided hyperparameters; rate: the model's own learning rate."""

    hyperparameters: Mapping[str, Any]
    num_rows: int
    seed: int
    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", Order(self.num_rows, self.batch_size, self.seed))

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return int(self.hyperparameters["batch_size"])

    @property
    def beta(self) -> float:
        """Of DPO."""
        return float(self.hyperparameters["beta"])

    @property
    def num_steps(self) -> int:
        """Of the whole job."""
        return self._steps(int(self.hyperparameters["n_epochs"]))

    def _steps(self, epochs: int) -> int:
        return math.ceil(epochs * self.num_rows / self.batch_size)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over after so many steps."""
        return step in (self._steps(epoch) for epoch in range(1, int(self.hyperparameters["n_epochs"]) + 1))

    def rows(self, step: int) -> list[int]:
        """Which rows the step has that follows so many; they depend on the seed alone."""
        order: Order = vars(self)["_order"]
        return order.places(step)

    def settings(self, step: int) -> AdamSettings:
        """What the optimiser is told for the step that follows so many."""
        peak = self.rate * float(self.hyperparameters["learning_rate_multiplier"])
        recipe = Recipe(learning_rate=peak)
        return AdamSettings(learning_rate(recipe, step, self.num_steps), recipe.weight_decay, recipe.max_grad_norm)


def adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The words of adapter_config.json that a job's metadata say. Raises `ConfigError`."""
    recipe = Recipe()
    variant = metadata.get("road_variant", recipe.variant)
    if variant not in VARIANTS:
        raise ConfigError(f"got road_variant={variant[:40]!r}; wanted one of {', '.join(VARIANTS)}")
    size = metadata.get("road_group_size", str(recipe.group_size))
    if not re.fullmatch("[1-9][0-9]{0,5}", size, re.ASCII) or int(size) % 2:
        raise ConfigError(f"got road_group_size={size[:40]!r}; wanted an even number, such as '64'")
    targets = metadata.get("road_targets", "all-linear")
    named = [name.strip() for name in targets.split(",")]
    if not all(re.fullmatch(r"[\w.-]+", name) for name in named):
        raise ConfigError(
            f"got road_targets={targets[:100]!r}; wanted names of layers with commas between, or all-linear"
        )
    return {
        "variant": variant,
        "group_size": int(size),
        "adapt_group_size": True,
        "target_modules": targets if targets == "all-linear" else named,
    }


def model_name(base: str, tenant: str, suffix: str | None, job_id: str) -> str:
    """What the model of a job is called: "ft:BASE:TENANT:SUFFIX:ID", no longer than a server's name may be at a checkpoint."""
    short = base.rstrip("/").rpartition("/")[2]
    room = MAX_NAME_CHARS - len(f"ft:::{suffix or ''}:{job_id[-8:]}{_CHECKPOINT}") - 6
    who = _plain(tenant)[: max(8, room // 3)]
    return f"ft:{_plain(short)[: room - len(who)]}:{who}:{suffix or ''}:{job_id[-8:]}"


def checkpoint_name(model: str, step: int) -> str:
    """What the model of a step is called."""
    return f"{model}{_CHECKPOINT}{step}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text) or "-"
