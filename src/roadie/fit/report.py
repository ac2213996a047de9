"""What a fit gives: the adapter, and how much of the change it explains, a layer each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from roadie.adapter import Adapter


@dataclass(frozen=True)
class LayerReport:
    """How well the rotation of one layer explains its change.

    path: of the module; outputs: D; group_size, variant: of the rotation; parameters: elements of theta and alpha;
    norm, change, error: Frobenius norms of what it was, of the wanted change, and of what is left of that change with the
    parameters as they are stored (of weights with bias, or of outputs where it was fitted to activations); kept: whether
    the adapter has it: not where nothing changed, or where less is explained than was asked for.
    """

    path: str
    outputs: int
    variant: str
    group_size: int
    parameters: int
    norm: float
    change: float
    error: float
    kept: bool

    @property
    def share_explained(self) -> float:
        """1 - error^2 / change^2: 0 nothing, 1 everything; 0 where nothing changed."""
        return 1 - (self.error / self.change) ** 2 if self.change else 0.0

    @property
    def relative_change(self) -> float:
        """change / norm."""
        return self.change / self.norm if self.norm else math.inf if self.change else 0.0

    def to_mapping(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "share_explained": self.share_explained}


class Reason(str, Enum):
    """Why a tensor was not fitted."""

    NOT_A_TARGET = "changed, not a target"
    SHAPE = "another shape"
    ADDED = "only in the tuned one"
    REMOVED = "only in the base"


@dataclass(frozen=True)
class NotFitted:
    """A tensor whose change no rotation stands for: its name, why, and the Frobenius norm of its change where there is one."""

    name: str
    reason: Reason
    change: float | None = None


@dataclass(frozen=True, eq=False)
class Fit:
    """The best adapter, a report for each targeted layer by module path, and the changes that no layer stands for."""

    adapter: Adapter
    layers: Mapping[str, LayerReport]
    not_fitted: tuple[NotFitted, ...] = ()

    @property
    def share_explained(self) -> float:
        """The share of the squared change of all targeted layers that the adapter explains."""
        return self._explained() / whole if (whole := _squares(layer.change for layer in self.layers.values())) else 0.0

    @property
    def share_of_everything(self) -> float:
        """The same, over the change of the tensors that were not fitted too."""
        whole = _squares([layer.change for layer in self.layers.values()] + [t.change or 0.0 for t in self.not_fitted])
        return self._explained() / whole if whole else 0.0

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that the adapter has."""
        return tuple(layer for layer in self.layers.values() if layer.kept)

    def _explained(self) -> float:
        return math.fsum(layer.change**2 - layer.error**2 for layer in self.kept)

    def to_mapping(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "share_explained": self.share_explained,
            "share_of_everything": self.share_of_everything,
            "parameters": self.adapter.num_parameters,
            "layers": [layer.to_mapping() for layer in self.layers.values()],
            "not_fitted": [asdict(tensor) for tensor in self.not_fitted],
        }


def _squares(norms: Iterable[float]) -> float:
    return math.fsum(norm**2 for norm in norms)
