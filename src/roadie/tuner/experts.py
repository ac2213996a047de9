"""RoAd at stacked experts: one projection of them is a layer, whose outputs are those of all experts, end to end.

It is a child of the experts module ("road_gate_up", "road_down"; see `roadie.adapter`), which asks it for rotations between the
projections (`roadie.experts`). Parameters, tables, rows, files and merging are those of any RoAd layer, whose D is all that is
rotated apart; only which rotation a row of outputs wants is found in another way: by the pair of a token and an expert.

Adapters that rotate each expert and those that share a rotation have parts of their own. Where both are active the former come
first; what is merged into their one weight is remembered by both together, and taken out in the order that this wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roadie.adapter import EACH, SHARED, expert_site
from roadie.experts import ExpertSite, Pairs, attach, check_group_sizes, release
from roadie.kernels import rotate_checked
from roadie.rotation import Rotation
from roadie.tuner.injection import layer_config
from roadie.tuner.merged import MergedLayer
from roadie.tuner.merging import WeightRotations
from roadie.tuner.rotating import check_variant, group_sizes_of
from roadie.tuner.weight import BaseWeight, StackedWeight


class RoadExperts(nn.Module, MergedLayer):
    """What rotates the outputs of one projection of stacked experts: ``[P, D]``, for pairs of a token and an expert."""

    def __init__(self, site: ExpertSite, path: str, adapter_name: str) -> None:
        super().__init__()
        self.__dict__["site"], self.path = (
            site,
            path,
        )  # the experts, which this is a part of, would be found twice as a child
        MergedLayer.__init__(self, site.out_features)
        other = self._other()
        if other is not None:
            self.merged_adapters, self._merges = other.merged_adapters, other._merges
        self._active_adapter = adapter_name
        self.train(site.projection.experts.training)

    @property
    def num_rotations(self) -> int:
        """How many rotations lie end to end."""
        number: int = self.__dict__["site"].num_rotations
        return number

    @property
    def base_layer(self) -> nn.Module:
        """The experts."""
        experts: nn.Module = self.__dict__["site"].projection.experts
        return experts

    def update_layer(self, adapter_name: str, config: Any, inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name`, or start it anew; raises `ConfigError` with nothing changed."""
        check_variant(config.variant)
        check_group_sizes(self.__dict__["site"], group_sizes_of(config))
        self.add(adapter_name, config, group_sizes_of(config), inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.__dict__["site"].projection.weight
        for store in (self.road_theta, self.road_alpha):
            if store[adapter_name].device.type != "meta":
                store[adapter_name] = store[adapter_name].to(device or weight.device, weight.dtype)

    def rests(self) -> bool:
        """Whether nothing is rotated now. What is merged is taken out where adapters were switched off meanwhile."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return not self._is_in_force()

    def of(self, y: Tensor, is_fresh: Any, pairs: Pairs) -> Tensor:
        """As a module, whose hooks see the call."""
        rotated: Tensor = self(y, pairs)
        return rotated

    def forward(self, y: Tensor, pairs: Pairs) -> Tensor:
        """y ``[P, D]``, in the order of rotations, each row by the adapter of its token and the rotation of its expert."""
        choice = self._routing.current()
        if choice is None:
            found, slots = self._made(None), None
        else:
            in_bank = None if torch.compiler.is_compiling() else choice.in_bank
            if in_bank is not None and not (torch.is_grad_enabled() and choice.trains):
                return y if self.resident is None else self.resident.by(in_bank, y, lambda: True, pairs)
            found, slots = self._made_for(choice), pairs.placed(choice, self.base_layer)
        if found.chain is None:
            return y
        chain, of_pairs = pairs.spread(found.chain, slots, self.num_rotations)
        return rotate_checked(y, chain, of_pairs, found.keep, True)

    def _weight_rotations(self, names: Sequence[str]) -> WeightRotations:
        rotations, site = super()._weight_rotations(names), self.__dict__["site"]
        times = site.projection.num_experts // self.num_rotations
        return WeightRotations(
            tuple(Rotation(r.direct.repeat(times), r.cross.repeat(times), r.group_size) for r in rotations.rows)
        )

    def _base_weight(self) -> BaseWeight:
        return StackedWeight(self.__dict__["site"].projection)

    def unmerge(self) -> None:
        """As of any layer; the other part at the same weight may have done it already."""
        if self.merged or self._other() is None:
            super().unmerge()

    def _other(self) -> Any:
        """The part of the other kind at the same weight, if there is one."""
        site = self.__dict__["site"]
        kind = EACH if site.kind == SHARED else SHARED
        return self.base_layer._modules.get(expert_site(site.projection.name, kind))

    def remove(self) -> None:
        """The experts lose this part, and with the last one their forward here."""
        delattr(self.base_layer, self.__dict__["site"].name)
        release(self.base_layer)

    def __repr__(self) -> str:
        return f"RoadExperts({self.out_features}, stages={self.stages})"


def adapt_experts(experts: nn.Module, path: str, adapter_name: str, config: Any, *, is_active: bool) -> None:
    """Give the experts at `path` an adapter, at each of their projections, of a config that fits them."""
    for site in ExpertSite.of(experts, config.target_experts):
        where = f"{path}.{site.name}"
        layer: Any = experts._modules.get(site.name)
        is_new = layer is None
        if is_new:
            layer = RoadExperts(site, where, adapter_name)
            experts.add_module(site.name, layer)
            attach(site)
        resolved = layer_config(config, where, 0, site.out_features)
        layer.update_layer(adapter_name, config=resolved, inference_mode=not is_new and config.inference_mode)
        if is_new and not is_active:
            layer.requires_grad_(False)
