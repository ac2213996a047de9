"""Which modules hold the stacked weights of many experts, what their projections are, and which of them cannot be adapted.

transformers marks such a module with what its weights are like: ``[E, D, in]`` or ``[E, in, D]`` (`is_transposed`), with biases
or without (`has_bias`), gate and up end to end or in turns (`is_concatenated`).

**One order of outputs.** A rotation knows nothing of that: at a projection of gate and up its vectors are those of the gate,
then those of up, whatever the weight is like; and where each expert has a rotation of its own, those of the first expert, then
those of the second. No group crosses a border between two, so that no pair joins a gate and an up, or two experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roadie.adapter import EACH, SHARED, expert_site
from roadie.errors import ConfigError

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""transformers' implementations that are computed here with rotations between."""
_MARKS = {"has_bias", "has_gate", "is_concatenated", "is_transposed"}
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of all experts of a module: "gate_up", or "up" where there is no gate, and "down".

    parts: 2 where the outputs are a gate and an up.
    """

    experts: Any
    name: str
    parts: int = 1

    @property
    def weight(self) -> Tensor:
        """``[E, D, in]``, or ``[E, in, D]``."""
        weight: Tensor = getattr(self.experts, f"{self.name}_proj")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """``[E, D]``, where there is one."""
        return getattr(self.experts, f"{self.name}_proj_bias") if self.experts.has_bias else None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """D, of one expert."""
        return self.weight.shape[2 if self.experts.is_transposed else 1]

    @property
    def _is_interleaved(self) -> bool:
        return self.parts > 1 and not self.experts.is_concatenated

    def in_order(self, y: Tensor) -> Tensor:
        """Outputs ``[P, D]`` as the weight has them, in the order of rotations: gate, then up."""
        return y.unflatten(-1, (-1, self.parts)).mT.flatten(-2) if self._is_interleaved else y

    def as_stored(self, y: Tensor) -> Tensor:
        """The way back from `in_order`."""
        return y.unflatten(-1, (self.parts, -1)).mT.flatten(-2) if self._is_interleaved else y

    def blocks(self, stored: Tensor) -> Tensor:
        """A weight, or a bias, as a view ``[E, parts, D / parts, in]`` (1 for in), in the order of rotations."""
        is_transposed = stored.dim() == 3 and self.experts.is_transposed
        rows = stored.mT if is_transposed else stored if stored.dim() == 3 else stored.unsqueeze(-1)
        if self._is_interleaved:
            return rows.unflatten(1, (-1, self.parts)).transpose(1, 2)
        return rows.unflatten(1, (self.parts, -1))


@dataclass(frozen=True, eq=False)
class ExpertSite:
    """Where outputs of one projection are rotated; kind: "each" expert by a rotation of its own, or all by one ("shared")."""

    projection: Projection
    kind: str

    @property
    def name(self) -> str:
        """The last part of its path, after that of the experts."""
        return expert_site(self.projection.name, self.kind)

    @property
    def num_rotations(self) -> int:
        """E, or 1 where the rotation is shared."""
        return self.projection.num_experts if self.kind == EACH else 1

    @property
    def out_features(self) -> int:
        """The width of a rotation of all that is rotated apart, end to end: E D, or D where it is shared."""
        return self.num_rotations * self.projection.out_features

    @classmethod
    def of(cls, experts: nn.Module, kind: str) -> list[ExpertSite]:
        """Those of one kind of an experts module."""
        return [cls(projection, kind) for projection in projections(experts)]

    @classmethod
    def in_model(cls, model: nn.Module) -> dict[str, ExpertSite]:
        """Path -> every site, of both kinds, of the experts of `model` that can be adapted."""
        able = {path: m for path, m in experts_in(model).items() if refusal(m, model) is None}
        sites = [(path, site) for path, m in able.items() for kind in (EACH, SHARED) for site in cls.of(m, kind)]
        return {f"{path}.{site.name}": site for path, site in sites}

    @classmethod
    def refused_in(cls, model: nn.Module) -> dict[str, str]:
        """Path -> why the experts there cannot be adapted, for whatever an adapter may call their sites."""
        names = [expert_site(name, kind) for name in ("gate_up", "up", "down") for kind in (EACH, SHARED)]
        reasons = {path: refusal(experts, model) for path, experts in experts_in(model).items()}
        return {f"{path}.{name}": reason for path, reason in reasons.items() if reason is not None for name in names}


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts that transformers' registry of experts implementations computes.

    And says how they lie in memory: transformers 5.0 does not say whether gate and up are in turns.
    """
    return module.__dict__.keys() >= _MARKS and hasattr(type(module).forward, "__wrapped__")


def projections(experts: Any) -> tuple[Projection, Projection]:
    """What comes before the activation, and what comes after."""
    first = Projection(experts, "gate_up", 2) if experts.has_gate else Projection(experts, "up")
    return first, Projection(experts, "down")


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every module that holds the weights of many experts in parameters of three dimensions, of any kind."""
    return {path: module for path, module in model.named_modules() if is_experts(module) or _is_stacked(path, module)}


def _is_stacked(path: str, module: nn.Module) -> bool:
    if "expert" not in path.rpartition(".")[2] and "Experts" not in type(module).__name__:
        return False
    are_packed = any(name in module.__dict__ for name in _WEIGHTS)  # objects of kernels, such as those of loaded MXFP4
    return are_packed or any(p.dim() >= 3 for p in module.parameters(recurse=False))


def refusal(module: Any, model: Any) -> str | None:
    """Why the experts of a module in `model` cannot be adapted: got, wanted, do; None where they can."""
    kind, packed = type(module).__name__, _packed(module)
    if packed is not None:
        return (
            f"got experts of class {kind} with {packed}; wanted floating-point weights of three dimensions: rotations lie "
            "between the projections, which kernels of FP8 and MXFP4 compute at once; load the model dequantised"
        )
    if not is_experts(module):
        return (
            f"got experts of class {kind}, which is not computed by transformers' registry of experts implementations; wanted "
            "one that is, in transformers 5.17 or newer; put it into exclude_modules, or leave target_experts out"
        )
    if getattr(module, "_is_expert_parallel", False) or any(
        hasattr(each.weight, "to_local") for each in projections(module)
    ):
        return "got experts that several processes share; wanted whole ones; load the model without expert or tensor parallelism"
    if getattr(model, "use_kernels", False):
        return (
            "got a model with use_kernels=True, whose kernels compute blocks of experts without calling them; wanted none; load "
            "it without use_kernels"
        )
    name = implementation_of(module)
    if name not in IMPLEMENTATIONS:
        return (
            f"got experts_implementation={name!r}, which leaves no place between the projections; wanted one of "
            f"{', '.join(IMPLEMENTATIONS)}; call model.set_experts_implementation('grouped_mm')"
        )
    return None


def _packed(module: nn.Module) -> str | None:
    """What one weight of experts is, by dtype and shape or by class, where it cannot be rotated as it is."""
    needed = {f"{each.name}_proj" for each in projections(module)} if is_experts(module) else set()
    for name in _WEIGHTS:
        weight = getattr(module, name, None)
        if isinstance(weight, Tensor) and (weight.dim() != 3 or weight.dtype not in _DTYPES):
            return f"{name} of {weight.dtype} {list(weight.shape)}"
        if not isinstance(weight, Tensor) and (weight is not None or name in needed):
            return f"{name} of class {type(weight).__name__}"
    return None


def implementation_of(experts: Any) -> str:
    """The implementation that the model of an experts module is configured with."""
    config = experts.config
    return getattr(getattr(config, "adapted", config), "_experts_implementation", None) or "eager"


def check_group_sizes(site: ExpertSite, stages: Sequence[int]) -> None:
    """Raise `ConfigError` where a group would cross the border between two experts, or between gate and up."""
    width = site.projection.out_features // site.projection.parts
    for size in stages:
        if width % size:
            what = "the gate, or up, of one expert" if site.projection.parts > 1 else "one expert"
            raise ConfigError(
                f"got group_size={size} for the {width} outputs of {what}; wanted a divisor, so that no pair joins two of them; "
                f"set group_size_pattern={{{site.name!r}: ...}}"
            )
