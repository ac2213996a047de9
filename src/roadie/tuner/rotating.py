"""What holds adapters, and rotates by them: the part that a layer's output and its input share.

The rotation of a plain batch and of a mixed one is the same: tables of rotations, one row of which (or one for each row of the
batch) is applied to what is given.

Legend: B rows of the batch, D features that are rotated, n parameters of theta and of alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from roadie.adapter import stages_of
from roadie.bank.attachment import LayerRotation
from roadie.bank.live import on_this_process
from roadie.errors import ConfigError
from roadie.kernels import (
    Chain,
    Keep,
    can_rotate_chain_in_place,
    prepare_chain,
    rotate_chain,
    rotate_chain_,
    settled,
    takes_kernels,
)
from roadie.rotation import Rotation, Variant, chain_from_parameters, parameter_size, to_dense
from roadie.tuner.output import KeptForBackward, one_rotation
from roadie.tuner.routing import AdapterChoice, RoadRouting
from roadie.tuner.table import PLAIN, LastRotation, SlotParameters, TableCache, build_chain, with_blends
from roadie.tuner.trained import rotated_by_one, trained_chain


class RoadLayer(BaseTunerLayer):
    """What rotates a layer's output (`Linear`) or its input (`RoadInput`): of each adapter theta, alpha, variant and group size.

    road_theta, road_alpha: parameters ``[n]`` by adapter name, n = D/2 (road_1), D (road_2) or 2 D (road_4), times the number
    of rotations in a row; variant: by adapter name; group_size: by adapter name, a tuple of several where the adapter has
    that many rotations in a row; out_features: D.
    """

    adapter_layer_names: tuple[str, ...] = ("road_theta", "road_alpha")
    other_param_names: tuple[str, ...] = ("variant", "group_size")
    cast_input_dtype_enabled: bool = True  # PEFT's helpers expect it; RoAd never casts the layer's input

    held_by: tuple[str, ...] = ()  # LoRA that is merged into the weight after RoAd: R must not change under it

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features
        self.variant: dict[str, str] = {}
        self.group_size: dict[str, int | tuple[int, ...]] = {}
        self.road_theta = nn.ParameterDict({})
        self.road_alpha = nn.ParameterDict({})
        self._disable_adapters = False
        self._before_off: tuple[list[tuple[nn.Parameter, bool]], list[str]] | None = None
        self.kept_for_backward = KeptForBackward.AUTO
        self._tables = TableCache()
        self._routing = RoadRouting()
        self.resident: LayerRotation | None = None

    @property
    def _available_adapters(self) -> set[str]:
        return set(self.road_theta)

    def add(self, adapter_name: str, config: Any, stages: tuple[int, ...], inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name` of the config's variant and these group sizes, checked before, or start it anew."""
        size = len(stages) * parameter_size(config.variant, self.out_features)
        self.variant[adapter_name] = config.variant
        self.group_size[adapter_name] = stages if len(stages) > 1 else stages[0]
        self.road_theta[adapter_name] = nn.Parameter(torch.empty(size))
        self.road_alpha[adapter_name] = nn.Parameter(torch.empty(size))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT does; but where accelerate offloads the base layer, to the device it computes on, not to "meta"."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or _offload_device(self.get_base_layer()))

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Set an adapter to the identity (True), or to random values: theta ~ N(0, 0.5), alpha ~ N(1, 0.5) (False)."""
        theta, alpha = self.road_theta[adapter_name], self.road_alpha[adapter_name]
        with torch.no_grad():
            if init_weights is False:
                theta.normal_(mean=0.0, std=0.5)
                alpha.normal_(mean=1.0, std=0.5)
            else:
                theta.zero_()
                alpha.fill_(1.0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense R of an adapter, ``[D, D]``, in float32 or wider: for looking at, not for computing with."""
        return reduce(lambda inner, outer: outer @ inner, map(to_dense, self.rotations(adapter)))

    def rotation(self, adapter: str) -> Rotation:
        """What an adapter of one rotation does to this layer: direct and cross ``[D]`` in float32 or wider; differentiable.

        Raises `ConfigError` for unknown adapters, and for those with several rotations in a row.
        """
        rotations = self.rotations(adapter)
        if len(rotations) > 1:
            raise ConfigError(
                f"got adapter {adapter!r} with {len(rotations)} rotations in a row; wanted a single rotation; use rotations"
            )
        return rotations[0]

    def rotations(self, adapter: str) -> tuple[Rotation, ...]:
        """What an adapter does to this layer, the rotation that is applied first before the others; see `rotation`."""
        slot = self._slot(adapter)
        if slot is None:
            raise ConfigError(
                f"got adapter {adapter!r}, which this layer does not have; it has {sorted(self.road_theta)}"
            )
        return chain_from_parameters(slot.theta, slot.alpha, slot.variant, slot.stages)

    def clear_cache(self) -> None:
        """Forget rotations computed from the parameters; needed only after writing to ``.data`` of frozen GPU parameters."""
        self._tables.clear()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, applied in the order given; see PEFT's BaseTunerLayer."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._tables.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off. While they are off none is trained; then each is trainable or frozen as it was before.

        Where others were made active meanwhile, what `set_adapter` made of them stays.
        """
        parameters = [*self.road_theta.values(), *self.road_alpha.values()]
        flags, active = self._before_off or ([(p, p.requires_grad) for p in parameters], list(self.active_adapters))
        if not enabled:
            flags_now = [(parameter, False) for parameter in parameters]
        else:
            flags_now = flags if active == list(self.active_adapters) else []
        for parameter, flag in flags_now:
            parameter.requires_grad_(flag)
        self._before_off = None if enabled else (flags, active)
        self._disable_adapters = not enabled
        self._tables.clear()

    def get_base_layer_device(self) -> torch.device:
        """The device of the adapter's parameters, or of the base layer where there is none."""
        tensor = next(iter(self.road_theta.values()), None)
        return tensor.device if tensor is not None else next(self.get_base_layer().parameters()).device

    def _is_in_force(self) -> bool:
        """Whether an adapter would rotate what is given now."""
        if self.disable_adapters or self.merged:
            return False
        return self._routing.current() is not None or any(name in self.road_theta for name in self.active_adapters)

    def _slot(self, adapter: str) -> SlotParameters | None:
        if adapter not in self.road_theta:
            return None
        parameters = on_this_process(self.road_theta[adapter]), on_this_process(self.road_alpha[adapter])
        return SlotParameters(*parameters, self.variant[adapter], self.group_size[adapter])

    def _rotated(self, y: Tensor, is_fresh: bool) -> Tensor:
        """y ``[..., D]``, each row rotated by the adapter that is in force for it; in place, where nobody else holds y."""
        if self._routing.current() is not None:
            return self._routed(y, is_fresh)
        slot = self._trained_slot()
        if slot is not None:
            return self._trained(y, slot, is_fresh)
        for names in self._runs():
            table = self._table(names, None)
            if table is not None:
                y = self._turned(y, one_rotation(table), None, names, is_fresh)
        return y

    def _routed(self, y: Tensor, is_fresh: bool) -> Tensor:
        """y, each row rotated as its wish says: from the bank, or from a table made for this batch."""
        choice = self._routing.current()
        assert choice is not None
        if not torch.compiler.is_compiling():
            in_bank = choice.in_bank
            if in_bank is not None and not (torch.is_grad_enabled() and choice.trains):
                return y if self.resident is None else self.resident.by(in_bank, y, lambda: is_fresh)
        table = self._table_of(choice)
        return y if table is None else self._turned(y, table, self._slots_of(y, choice), choice.adapters, is_fresh)

    def _slots_of(self, y: Tensor, choice: AdapterChoice) -> Tensor:
        """Which row of the table each row of y uses; -1: none, and it passes bit for bit."""
        return choice.placed(y, self.get_base_layer())

    def _table_of(self, choice: AdapterChoice) -> Chain | None:
        """The table of what the rows of a batch wish for; None where that is the identity."""
        if not choice.blends:
            return self._table(choice.adapters, choice.mark)
        names = tuple([name for name in choice.adapters if name in self.road_theta])
        return with_blends(self._table(names, choice.mark), names, choice.names) if names else None

    def _turned(self, y: Tensor, table: Chain, slots: Tensor | None, names: tuple[str, ...], is_fresh: bool) -> Tensor:
        if is_fresh and can_rotate_chain_in_place(y, table):
            z = rotate_chain_(y, table, slots)
            if slots is None:
                self._remember(z, table, names[0])
            return z
        keep = self.kept_for_backward.of({self.variant[name] for name in names if name in self.variant})
        return rotate_chain(y, table, slots, keep=keep)

    def _remember(self, y: Tensor, table: Chain, name: str) -> None:
        """Get ready to rotate in the same way the next time, where all that the table was made from can be watched."""
        entry, active = self._tables.entries.get((name,)), self._active_adapter
        if entry is None or active not in (name, [name]):
            return
        prepared = prepare_chain(y, table, None, (entry.parameters[0], entry.parameters[1]))
        if prepared is not None:
            self._tables.last = LastRotation(prepared, copy(active), entry)

    def _in_order(self) -> Iterable[str]:
        """The active adapters, the one that is applied first before the others."""
        return self.active_adapters

    def _runs(self) -> list[tuple[str, ...]]:
        """The active adapters that are here, in order; single rotations of one group size, which compose, stand together."""
        runs: list[tuple[str, ...]] = []
        for name in self._in_order():
            if name not in self.road_theta:
                continue
            size = self.group_size[name]
            if runs and isinstance(size, int) and self.group_size[runs[-1][0]] == size:
                runs[-1] = (*runs[-1], name)
            else:
                runs.append((name,))
        return runs

    def _table(self, names: tuple[str, ...], batch: object) -> Chain | None:
        if not torch.compiler.is_compiling():
            entry = self._tables.checked(names, batch)
            if entry is not None and not torch.is_grad_enabled():
                return entry.table
        slots = tuple(self._slot(name) for name in names)
        if torch.compiler.is_compiling():
            return build_chain(slots, self.out_features)
        if torch.is_grad_enabled() and any(slot is not None and slot.requires_grad for slot in slots):
            self._tables.clear()
            return trained_chain(slots, self.out_features)
        return self._tables.get(names, slots, self.out_features, batch)

    def _trained_slot(self) -> SlotParameters | None:
        """The one active adapter of a plain batch, where it is being trained."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        entry, active = self._tables.trained, self._active_adapter
        if entry is not None and active in (entry.name, [entry.name]) and entry.is_of(self):
            slot = entry.slots[0]
        else:
            runs = self._runs()
            slot = self._slot(runs[0][0]) if len(runs) == 1 and len(runs[0]) == 1 else None
        return slot if slot is not None and slot.requires_grad else None

    def _trained(self, y: Tensor, slot: SlotParameters, is_fresh: bool) -> Tensor:
        """y rotated by the adapter that is being trained, in one step of autograd where that is possible."""
        if len(slot.stages) > 1:
            chain = trained_chain([slot], self.out_features)
            assert chain is not None
            return rotate_chain(y, chain, None)
        kept = self._kept_table(slot)
        keep = settled(self.kept_for_backward.of({slot.variant}), y)
        if kept is None or not takes_kernels(y, kept[0]):
            chain = build_chain([slot], self.out_features)
            assert chain is not None
            return rotate_chain(y, chain, None, keep=keep)
        into_y = is_fresh and keep is not Keep.INPUT and not y._is_view()
        return rotated_by_one(y, slot, kept[0], keep, into_y=into_y)

    def _kept_table(self, slot: SlotParameters) -> Chain | None:
        """The table of one adapter, kept until a training step changes it; None where a parameter is not plain memory."""
        entry, self._tables.last = self._tables.trained, None
        if entry is not None and entry.slots[0] is slot and entry.is_unwritten() and entry.has_same_content():
            return entry.table
        if not all(type(tensor) in PLAIN for tensor in slot[:2]):
            return None
        name = next((name for name, theta in self.road_theta.items() if theta is slot.theta), None)
        if name is None:  # a part of a parameter that several processes share
            return None
        table = self._tables.get((name,), (slot,), self.out_features, None)
        self._tables.trained = self._tables.entries.get((name,))
        return table


def _offload_device(base_layer: nn.Module) -> torch.device | None:
    """Where accelerate's hook has an offloaded layer compute; None for any other."""
    hook = getattr(base_layer, "_hf_hook", None)
    if not getattr(hook, "offload", False):
        return None
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


def group_sizes_of(config: Any) -> tuple[int, ...]:
    """The group sizes of the rotations in a row that a config, roadie's or stock PEFT's, gives a layer's output."""
    return stages_of(getattr(config, "stages", None) or config.group_size)


def input_group_sizes_of(config: Any) -> tuple[int, ...]:
    """As `group_sizes_of`, for the layer's input; empty where it is not rotated."""
    stages = getattr(config, "input_stages", None)
    return stages_of(stages) if stages else ()


def check_variant(variant: str) -> None:
    if variant not in set(Variant):
        raise ConfigError(
            f"Unsupported variant {variant} for RoadLayer. Supported variants are road_1, road_2, and road_4. "
            f"Got {variant!r}, set after the config was made; set one of these."
        )
