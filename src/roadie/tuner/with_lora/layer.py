"""A linear layer with LoRA around RoAd: ``z = R (W x + b) + s B A x``, each row by its own adapters where rows are chosen.

PEFT's layer, with three things of its own: rows, in training too; merging in float32 or wider with one rounding, only after
RoAd; and unmerging that gives back half-precision weights bit for bit.

Legend: D out features, r rank; A ``[r, in]``, B ``[D, r]``, s = alpha / r (alpha / sqrt(r) for rsLoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from roadie.errors import MergeError
from roadie.sites.rows import Routing
from roadie.tuner.merging import ExactUnmerge
from roadie.tuner.patch import Patch, make_patch
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.weight import is_conv1d
from roadie.tuner.with_lora.rows import LoraChoice


@dataclass(frozen=True, eq=False)
class LoraMerge:
    """One merge: which adapters, what was added to the weight as factors, and what it takes to come back exactly."""

    adapters: tuple[str, ...]
    factors: tuple[tuple[Tensor, Tensor, float], ...]  # A, B, s
    patch: Patch | None
    bias: Tensor | None  # as it was


class LoraLinear(lora.Linear):
    """LoRA around a linear layer of any kind, RoAd's or a plain one; see the module."""

    lies_around_road = True  # RoadModel puts new adapters inside

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self.lora_routing: Routing[LoraChoice] = Routing()
        self.lora_merges: list[LoraMerge] = []

    @property
    def road(self) -> RoadLayer | None:
        """The RoAd layer inside, if there is one."""
        return self.base_layer if isinstance(self.base_layer, RoadLayer) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x ``[..., in]``; gives ``[..., D]`` in the dtype of the base layer."""
        choice = self.lora_routing.current()
        if choice is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return self._added_by_row(x, y, choice)

    def _added_by_row(self, x: Tensor, y: Tensor, choice: LoraChoice) -> Tensor:
        """y and, in new memory (backward may need y as it is), what each row's adapter adds to it."""
        rows, added = [], []
        for name, indices in choice.by_adapter(x, self.get_base_layer()).items():
            if name in self.lora_A:
                rows.append(torch.tensor(indices, device=x.device))
                added.append(self._branch(name, x[rows[-1]]))
        if not rows:
            return y
        whole = torch.cat(added)
        return y.to(whole.dtype).index_add(0, torch.cat(rows), whole).to(y.dtype)

    def _branch(self, name: str | None, x: Tensor) -> Tensor:
        down, up = self.lora_A[name], self.lora_B[name]
        x = self._cast_input_dtype(x, down.weight.dtype)
        return up(down(self.lora_dropout[name](x))) * self.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the given adapters (None: the active ones) to weight and bias, both or neither; after RoAd's are merged.

        Raises `MergeError`, with nothing changed, while an active RoAd adapter is not merged: R would rotate B A too.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self.check_order()
        self.check_merge(names, finite=safe_merge)
        weight, bias = self._parameters_of_base()
        factors = tuple(self._factors(name) for name in names)
        with torch.no_grad():
            merged = self._with_delta(weight, factors, 1.0)
            exact = self.road.exact_unmerge if self.road is not None else ExactUnmerge.HALF
            keeps = exact.holds_for(weight)
            patch = make_patch(weight, self._with_delta(merged, factors, -1.0)) if keeps else None
            old_bias = bias.clone() if bias is not None else None
            weight.copy_(merged)
            if bias is not None:
                bias.copy_(self._merged_bias(bias, names))
        self.lora_merges.append(LoraMerge(tuple(names), factors, patch, old_bias))
        self.merged_adapters.extend(names)
        self._hold()

    def unmerge(self) -> None:
        """Take all merges back, the last one first: bit for bit for half-precision weights, else up to rounding."""
        while self.lora_merges:
            self.undo_last_merge()

    def undo_last_merge(self) -> None:
        """Take back what the last call of `merge` did."""
        merge = self.lora_merges.pop()
        weight, bias = self._parameters_of_base()
        with torch.no_grad():
            back = self._with_delta(weight, merge.factors, -1.0)
            weight.copy_(merge.patch.apply(back) if merge.patch is not None else back)
            if bias is not None and merge.bias is not None:
                bias.copy_(merge.bias)
        del self.merged_adapters[len(self.merged_adapters) - len(merge.adapters) :]
        self._hold()

    def check_order(self) -> None:
        """Raise `MergeError` while RoAd has something to rotate in this layer and is not merged; changes nothing."""
        road = self.road
        if road is None or road.merged:
            return
        waiting = [name for name in road.active_adapters if name in road.road_theta]
        if waiting:
            raise MergeError(
                f"got LoRA to merge under RoAd adapter(s) {', '.join(waiting)}, not merged: the layer would give R (W + B A) x; "
                "wanted R W x + B A x; merge RoAd first: model.merge_adapter() merges both in order. Nothing was changed."
            )

    def check_merge(self, adapter_names: Sequence[str], *, finite: bool) -> None:
        """Raise `MergeError` where these adapters cannot be merged (finite: or give what is not finite); changes nothing."""
        names = [name for name in adapter_names if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        weight, bias = self._parameters_of_base()
        is_quantised = self.road is not None and self.road.quantization_backend is not None
        if type(weight.data) is not Tensor or not weight.is_floating_point() or is_quantised:
            raise MergeError(
                f"got LoRA to merge into a {type(base).__name__} that is quantised; wanted a floating-point weight; keep LoRA "
                "unmerged, or merge into an unquantised model. Nothing was changed."
            )
        if bias is None and any(self.lora_bias[name] for name in names):
            raise MergeError(
                f"got a LoRA adapter with lora_bias=True to merge into a {type(base).__name__} without a bias; wanted a layer "
                "with one; keep LoRA unmerged. Nothing was changed."
            )
        parts = [part for name in names for of in (self.lora_A, self.lora_B) for part in of[name].parameters()]
        if finite and not all(bool(torch.isfinite(part).all()) for part in parts):
            raise MergeError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken. Nothing was changed."
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer alone, with RoAd and then LoRA merged into it; PEFT calls this when it unloads a model."""
        if merge:
            if self.road is not None and not self.merged:
                self.road.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _hold(self) -> None:
        """RoAd must not change the weight under what was added to it."""
        if self.road is not None:
            self.road.hold(self.merged_adapters)

    def _parameters_of_base(self) -> tuple[Any, Any]:
        base = self.get_base_layer()
        return base.weight, getattr(base, "bias", None)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return down.detach().clone(), up.detach().clone(), float(self.scaling[name])

    def _with_delta(self, weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]], sign: float) -> Tensor:
        wide = _wide(weight)
        deltas = [scale * (up.to(weight.device, wide) @ down.to(weight.device, wide)) for down, up, scale in factors]
        delta = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
        delta = delta.T if self.fan_in_fan_out else delta
        return (weight.detach().to(wide) + sign * delta).to(weight.dtype)

    def _merged_bias(self, bias: Tensor, names: Sequence[str]) -> Tensor:
        added = [self.lora_B[name].bias * self.scaling[name] for name in names if self.lora_bias[name]]
        return sum((part.to(_wide(bias)) for part in added), bias.to(_wide(bias))).to(bias.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
