"""What to fit, and how: one frozen value, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roadie.adapter import check_settings, resolve_layer
from roadie.errors import ConfigError
from roadie.rotation import Variant

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Settings:
    """What a fit may choose.

    variant: road_2 holds every 2 x 2 block; road_4 the same with twice the parameters, road_1 scaled rotations with half;
    group_size: even; a layer that it does not divide is refused, or takes the greatest common divisor with
    adapt_group_size (roadie alone reads such adapters);
    target_modules: "all-linear", another regular expression for whole module paths, or names or ends of paths;
    exclude_modules: an expression or names of the same kind, of layers to leave out;
    ridge: prefers small blocks: added to the squared length of every row, as a part of it; 0: plain least squares;
    minimum_share: layers of which less of the squared change is explained are left out of the adapter.
    """

    variant: str = "road_2"
    group_size: int = 64
    adapt_group_size: bool = False
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    ridge: float = 0.0
    minimum_share: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self.config)
        _check_names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"got ridge={self.ridge}; wanted a finite number, 0 or more; try 1e-3")
        if not 0 <= self.minimum_share < 1:
            raise ConfigError(f"got minimum_share={self.minimum_share}; wanted 0 or more, and less than 1; try 0.01")

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of adapter_config.json that says what each layer has."""
        config = {"variant": self.variant, "group_size": self.group_size}
        return config | ({"adapt_group_size": True} if self.adapt_group_size else {})

    def of_layer(self, path: str, outputs: int) -> tuple[Variant, int]:
        """Variant and group size of a layer; raises `ConfigError`, naming it, where the group size does not fit."""
        variant, (group_size,) = resolve_layer(self.config, path, outputs)
        return variant, group_size

    def wants(self, path: str) -> bool:
        """Whether a linear layer at this path is a target, and not left out."""
        targets, excluded = self.target_modules, self.exclude_modules
        return (targets == ALL_LINEAR or _matches(targets, path)) and not (excluded and _matches(excluded, path))


def _matches(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _check_names(setting: str, targets: object) -> None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"got {setting}={targets!r}, which is no regular expression ({error}); wanted one"
            ) from None
    elif (
        not isinstance(targets, Sequence) or not targets or not all(isinstance(name, str) and name for name in targets)
    ):
        raise ConfigError(
            f"got {setting}={targets!r}; wanted '{ALL_LINEAR}', a regular expression, or names of linear layers"
        )
