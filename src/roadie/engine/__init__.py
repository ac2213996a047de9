"""Many adapters in training on one frozen model: the engine behind `roadie train-many`, and beside a server's sampling.

    engine = TrainingEngine(model)
    engine.create("a", RoadConfig(target_modules="all-linear"))
    engine.forward_backward("a", [TrainingRow(tokens, targets)], "cross_entropy")
    engine.optim_step("a", AdamSettings(learning_rate=3e-3))

Names resolve on first use. docs/engine.md is the guide.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadie.engine.calls import ForwardResult, StepResult, TrainingSettings
    from roadie.engine.losses import Loss, TrainingRow
    from roadie.engine.optimiser import AdamSettings
    from roadie.engine.tenants import TenantState
    from roadie.engine.training import TrainingEngine
    from roadie.engine.work import TrainingFigures

__all__ = [
    "AdamSettings",
    "ForwardResult",
    "Loss",
    "StepResult",
    "TenantState",
    "TrainingEngine",
    "TrainingFigures",
    "TrainingRow",
    "TrainingSettings",
]

_MODULES = {
    "calls": ("ForwardResult", "StepResult", "TrainingSettings"),
    "losses": ("Loss", "TrainingRow"),
    "optimiser": ("AdamSettings",),
    "tenants": ("TenantState",),
    "training": ("TrainingEngine",),
    "work": ("TrainingFigures",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
