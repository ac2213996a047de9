"""What holds adapters, and rotates by them: the part that a layer's output and its input share.

The rotation of a plain batch and of a mixed one is the same: tables of rotations, one row of which (or one for each row of the
batch) is applied to what is given.

Legend: B rows of the batch, D features that are rotated, n parameters of theta and of alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from roadie.adapter import stages_of
from roadie.bank.attachment import LayerRotation
from roadie.bank.blends import with_blends
from roadie.bank.live import on_this_process
from roadie.errors import ConfigError
from roadie.kernels import is_looked_on, prepare_checked, rotate_checked
from roadie.rotation import Rotation, Variant, chain_from_parameters, parameter_size, to_dense
from roadie.sites.parameters import Part, Slot, parts_of
from roadie.sites.rows import Choice
from roadie.tuner.output import KeptForBackward
from roadie.tuner.routing import AdapterChoice, RoadRouting
from roadie.tuner.tables import Kept, Last, Layout, Made, Names, Tables, are_trained, unseen_by_checkpoints


class RoadLayer(BaseTunerLayer):
    """What rotates a layer's output (`Linear`) or its input (`RoadInput`): of each adapter theta, alpha, variant and group size.

    road_theta, road_alpha: parameters ``[n]`` by adapter name, n = D/2 (road_1), D (road_2) or 2 D (road_4), times the number
    of stages; variant: by adapter name; stages: by adapter name, the group sizes of its chain, most
    often one; out_features: D.
    """

    adapter_layer_names: tuple[str, ...] = ("road_theta", "road_alpha")
    other_param_names: tuple[str, ...] = ("variant", "stages")
    cast_input_dtype_enabled: bool = True  # PEFT's helpers expect it; RoAd never casts the layer's input

    held_by: tuple[str, ...] = ()  # LoRA that is merged into the weight after RoAd: R must not change under it

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features
        self.variant: dict[str, str] = {}
        self.stages: dict[str, tuple[int, ...]] = {}
        self.road_theta = nn.ParameterDict({})
        self.road_alpha = nn.ParameterDict({})
        self._disable_adapters = False
        self._before_off: tuple[list[tuple[nn.Parameter, bool]], list[str]] | None = None
        self._kept = Kept()
        self._routing = RoadRouting()
        self.kept_for_backward = KeptForBackward.AUTO
        self.resident: LayerRotation | None = None

    @property
    def kept_for_backward(self) -> KeptForBackward:
        """Which tensor is kept for backward."""
        return self._kept_for_backward

    @kept_for_backward.setter
    def kept_for_backward(self, kept: KeptForBackward) -> None:
        self._kept_for_backward = kept
        self._changed()

    @property
    def group_size(self) -> dict[str, int]:
        """By adapter name, of the adapters that have one rotation."""
        return {name: stages[0] for name, stages in self.stages.items() if len(stages) == 1}

    def add(self, adapter_name: str, config: Any, stages: tuple[int, ...], inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name` of the config's variant and these group sizes, checked before, or start it anew."""
        size = len(stages) * parameter_size(config.variant, self.out_features)
        self._routing.additions += 1
        self.variant[adapter_name] = config.variant
        self.stages[adapter_name] = stages
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

        Raises `ConfigError` for unknown adapters, and for those with several stages.
        """
        rotations = self.rotations(adapter)
        if len(rotations) > 1:
            raise ConfigError(
                f"got adapter {adapter!r} with {len(rotations)} rotations in a row; wanted a single rotation; use rotations"
            )
        return rotations[0]

    def rotations(self, adapter: str) -> tuple[Rotation, ...]:
        """What an adapter does to this layer, the rotation that is applied first before the others; see `rotation`."""
        if adapter not in self.stages:
            raise ConfigError(f"got adapter {adapter!r}, which this layer does not have; it has {sorted(self.stages)}")
        theta, alpha = on_this_process(self.road_theta[adapter]), on_this_process(self.road_alpha[adapter])
        return chain_from_parameters(theta, alpha, self.variant[adapter], self.stages[adapter])

    def clear_cache(self) -> None:
        """Forget rotations computed from the parameters; needed only after writing to ``.data`` of frozen GPU parameters."""
        self._changed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, applied in the order given; see PEFT's BaseTunerLayer."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._changed()

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
        self._changed()

    def get_base_layer_device(self) -> torch.device:
        """The device of the adapter's parameters, or of the base layer where there is none."""
        tensor = next(iter(self.road_theta.values()), None)
        return tensor.device if tensor is not None else next(self.get_base_layer().parameters()).device

    def _is_in_force(self) -> bool:
        """Whether an adapter would rotate what is given now."""
        if self.disable_adapters or self.merged:
            return False
        return self._routing.current() is not None or any(name in self.road_theta for name in self.active_adapters)

    def names_for(self, names: Names) -> Iterable[str]:
        """The adapters of a table of these names; those that are active, in the order in which they are applied."""
        return self.active_adapters if names is None else names

    def slots(self, names: Names) -> list[Slot]:
        """What the slots of a table of these names are made of, in this layer."""
        of_each: list[Slot] = [self._parts(name) if name in self.stages else [] for name in self.names_for(names)]
        return [[part for parts in of_each for part in parts]] if names is None else of_each

    def _parts(self, adapter: str) -> list[Part]:
        theta, alpha = on_this_process(self.road_theta[adapter]), on_this_process(self.road_alpha[adapter])
        return parts_of(theta, alpha, self.variant[adapter], self.stages[adapter])

    def _rotated(self, y: Tensor, is_fresh: bool) -> Tensor:
        """y ``[..., D]``, each row rotated by the adapter that is in force for it; in place, where nobody else holds y."""
        choice = self._routing.current()
        if choice is not None:
            return self._routed(y, choice, is_fresh)
        found = self._made(None)
        if found.chain is None:
            return y
        z = rotate_checked(y, found.chain, None, found.keep, is_fresh)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._remember(y, found)
        return z

    def _routed(self, y: Tensor, choice: AdapterChoice, is_fresh: bool) -> Tensor:
        """y, each row rotated as its wish says: from the bank, or from a table of the adapters that are asked for."""
        in_bank = None if torch.compiler.is_compiling() else choice.in_bank
        if in_bank is not None and not (torch.is_grad_enabled() and choice.trains):
            return self._served(y, in_bank, is_fresh)
        found = self._made_for(choice)
        if found.chain is None:
            return y
        return rotate_checked(y, found.chain, self._slots_of(y, choice), found.keep, is_fresh)

    def _served(self, y: Tensor, in_bank: Choice, is_fresh: bool) -> Tensor:
        """y rotated by the bank."""
        if self.resident is None:
            return y
        z = self.resident.by(in_bank, y, lambda: is_fresh)
        prepared = self.resident.prepared
        if prepared is not None:
            self._kept.last = Last(in_bank.mark, y.dtype, prepared)
        return z

    def _slots_of(self, y: Tensor, choice: AdapterChoice) -> Tensor:
        """Which row of the table each row of y uses; -1: none, and it passes bit for bit."""
        return choice.placed(y, self.get_base_layer())

    def _made_for(self, choice: AdapterChoice) -> Made:
        """What the rows of a batch wish for."""
        if not choice.blends:
            return self._made(choice.names)  # type: ignore[arg-type]
        names = tuple([name for name in choice.adapters if name in self.stages])
        found = self._made(names)
        return found._replace(chain=with_blends(found.chain, names, choice.names))

    def _made(self, names: Names) -> Made:
        """What the adapters `names` do here: made for all layers before the model was called, or now for this one."""
        if torch.compiler.is_compiling():
            return Layout([self], names).made()[0]
        tables = self._routing.by.get()
        if isinstance(tables, Tables) and tables.layout.names == names:
            found = tables.of.get(self)
            if (
                found is not None
                # A wrapper may have put other parameters there until its call is over.
                and (not found.sources or found.sources[0][0].get(found.sources[0][1]) is found.tensors[0])
                and (tables.has_graph or not torch.is_grad_enabled() or not found.is_trained())
            ):
                return found
        changes = self._routing.changes
        if torch.is_grad_enabled() and are_trained([self], names):
            with unseen_by_checkpoints():
                return self._kept.layout(lambda: [self], names, changes).made()[0]
        kept = self._kept.current(names, changes)
        return (kept or self._kept.make(self._kept.layout(lambda: [self], names, changes))).of[self]

    def _by_itself(self) -> Tables | None:
        """What a layer that is called by itself, without a gradient, rotates by, if it is what it was the last time."""
        if torch.is_grad_enabled() or self._routing.here.get() is not None or is_looked_on():
            return None
        return self._kept.current(None, self._routing.changes)

    def _remember(self, y: Tensor, found: Made) -> None:
        """Get ready to rotate in the same way in later calls of the model, as long as the tables hold."""
        tables, last = self._routing.by.get() or self._by_itself(), self._kept.last
        if not isinstance(tables, Tables) or found.chain is None or tables.of.get(self) is not found:
            return
        if last is not None and last.by is tables and last.dtype == y.dtype:
            return  # too much for one thread, or with gaps
        prepared = prepare_checked(y, found.chain, None)
        self._kept.last = None if prepared is None else Last(tables, y.dtype, prepared)

    def hold(self, names: Iterable[str]) -> None:
        """From now on these adapters (LoRA) are merged into the weight after RoAd."""
        self.held_by = tuple(names)
        self._changed()

    def _changed(self) -> None:
        """What rotates here is another one from now on."""
        self._routing.changes += 1
        self._kept.clear()


def _offload_device(base_layer: nn.Module) -> torch.device | None:
    """Where accelerate's hook has an offloaded layer compute; None for any other."""
    hook = getattr(base_layer, "_hf_hook", None)
    if not getattr(hook, "offload", False):
        return None
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


def group_sizes_of(config: Any) -> tuple[int, ...]:
    """The group sizes of the chain that a config, roadie's or stock PEFT's, gives a layer's output."""
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
