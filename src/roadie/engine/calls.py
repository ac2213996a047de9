"""What tenants ask for, in the order in which each of them asks, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from roadie.bank.families import AdaptedLayer
from roadie.engine.losses import Terms
from roadie.engine.optimiser import AdamSettings
from roadie.engine.passes import RowResult
from roadie.engine.tenants import TenantState
from roadie.errors import ConfigError


@dataclass(frozen=True, eq=False)
class TrainingSettings:
    """How a training engine is sized. Raises `ConfigError` for values that cannot work.

    max_tokens_per_pass: tokens (padding counted) of one forward and backward; None: all that wait. logits_bytes: what logits may
    take at a time. keep: what adapted layers keep for backward: "auto", or "input", for adapters that may reach alpha = 0.
    max_tenants; max_calls_per_tenant, max_tokens_per_tenant: what of one may wait. owner_weights: shares of whoever is charged.
    """

    max_tokens_per_pass: int | None = 8192
    logits_bytes: int = 256 << 20
    keep: str = "auto"
    max_tenants: int = 4096
    max_calls_per_tenant: int = 256
    max_tokens_per_tenant: int = 1 << 24
    owner_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "max_tokens_per_pass",
            "logits_bytes",
            "max_tenants",
            "max_calls_per_tenant",
            "max_tokens_per_tenant",
        ):
            value = getattr(self, name)
            is_left_out = value is None and name == "max_tokens_per_pass"
            if not is_left_out and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"got {name}={value!r}; wanted a whole number of at least 1")
        if self.keep not in ("auto", "input"):
            raise ConfigError(f"got keep={self.keep!r}; wanted 'auto' or 'input'")
        wrong = {owner: weight for owner, weight in self.owner_weights.items() if not weight > 0}
        if wrong:
            raise ConfigError(f"got owner_weights {wrong}; wanted numbers above 0")


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """What became of the rows of a call.

    loss: the sum over all tokens; losses: of each row; logprobs: of each row's targets, in their shape, float32 on the CPU; NaN
    where none was computed: of tokens without weight, unless all were asked for.
    """

    loss: float
    losses: tuple[float, ...]
    logprobs: tuple[Tensor, ...]


@dataclass(frozen=True)
class StepResult:
    """An optimiser's step that was made: its number, from 1, and the norm of the gradient before it was clipped."""

    step: int
    gradient_norm: float


@dataclass(eq=False)
class Call:
    """Rows to be computed, some in this pass and some in the next. gradients: of the passes before the last one, by stack."""

    tenant: str
    rows: Sequence[Terms]
    backward: bool
    future: Future[ForwardResult] = field(default_factory=Future)
    results: dict[int, RowResult] = field(default_factory=dict)
    gradients: list[Tensor] | None = None
    waiting: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index].tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows that wait."""
        return sum(len(self.rows[index].tokens) for index in self.waiting)

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Keep the gradients of a pass until the last one is done."""
        if self.gradients is None:
            self.gradients = [gradient.clone() for gradient in gradients]
        else:
            torch._foreach_add_(self.gradients, list(gradients))

    @property
    def result(self) -> ForwardResult:
        """Of all rows."""
        found = [self.results[index] for index in range(len(self.rows))]
        losses = tuple(row.loss for row in found)
        return ForwardResult(sum(losses), losses, tuple(row.logprobs for row in found))


@dataclass(frozen=True, eq=False)
class Step:
    """An optimiser's step."""

    tenant: str
    settings: AdamSettings
    future: Future[StepResult] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Join:
    """A tenant begins, with these layers; state: None for the identity."""

    tenant: str
    layers: tuple[AdaptedLayer, ...]
    state: TenantState | None
    future: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Leave:
    """A tenant ends."""

    tenant: str
    future: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Task:
    """Something that is done between two passes, such as taking a copy."""

    tenant: str
    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


Operation = Call | Step | Join | Leave | Task
