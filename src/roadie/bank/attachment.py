"""A bank's hold on the layers of a model: what rotates a layer's output, or its input, and how it gets at it.

A plain model is held by forward hooks (`sites_in`); it needs nothing but linear layers, and no PEFT, and taking the hooks off
leaves it as it was. Layers that rotate by themselves, such as the tuner's, are given to a bank as sites of their own kind.

A **site** is a layer's output, at the layer's path, or its input, at that path with `roadie.adapter.INPUT_SUFFIX`. Several layers
may be given one input, which is therefore never written to. The projections of stacked experts are sites too (`roadie.experts`).

Legend: D features of a site, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadie.adapter import INPUT_SUFFIX, PEFT_PREFIX, LayerParameters, experts_kind, is_input, layer_of
from roadie.errors import AdapterError, ConfigError
from roadie.experts import ExpertSite, Pairs, attach, check_group_sizes
from roadie.kernels import (
    Chain,
    Keep,
    PreparedRotation,
    is_looked_on,
    prepare_checked,
    rotate,
    rotate_checked,
)
from roadie.linear import check_output, gives_fresh_memory, in_features, is_linear, out_features, refusals
from roadie.sites.rows import Choice, Routing
from roadie.sites.table import SlotTable


class _Last(NamedTuple):
    """How a layer was rotated the last time, and for whom; prepared: from the second time on; slots: None where none has one."""

    mark: object
    table: Chain
    slots: Tensor | None
    prepared: PreparedRotation | None = None


class LayerRotation:
    """One layer, or its input: its table, and the choice of the rows. A copy of a model has none: its bank is another's.

    routing: of the bank; path: where the site is.
    """

    def __init__(self, table: SlotTable, routing: Routing[Choice], site: Site, path: str) -> None:
        self.table, self.path, self._routing, self._site = table, path, routing, site.layer
        self._num_rotations = site.num_rotations
        self._last: _Last | None = None

    def of(self, y: Tensor, is_fresh: Callable[[], bool], pairs: Pairs | None = None) -> Tensor:
        """y ``[B, ..., D]`` rotated by the slots in force, or y itself where none are, or none of them has a rotation here.

        is_fresh: whether nobody else holds y, so that it may be written to. pairs: those that y ``[P, D]`` is of, which
        experts give.
        """
        choice = self._routing.current()
        return y if choice is None else self.by(choice, y, is_fresh, pairs)

    def by(self, choice: Choice, y: Tensor, is_fresh: Callable[[], bool], pairs: Pairs | None = None) -> Tensor:
        """As `of`, by this choice."""
        if pairs is not None:
            return self._by_pairs(choice, y, pairs)
        table = self.table.current
        if torch.compiler.is_compiling():
            return rotate(y, table, self.table.routed(choice.placed(y, self._site)))
        last = self._last
        if last is not None and last.mark is choice.mark and last.table is table and not torch.is_grad_enabled():
            rotated = self._again(last, y, is_fresh)
            if rotated is not None:
                return rotated
        if not choice.is_static and self.table.has_none(choice.host):
            self._last = _Last(choice.mark, table, None)
            return y
        slots = self.table.routed(choice.placed(y, self._site))
        # Slots that were worked out of static ones are those of this call alone.
        is_kept = not choice.is_static or slots is choice.slots
        self._last = _Last(choice.mark, table, slots) if is_kept else None
        return rotate_checked(y, table, slots, Keep.INPUT, is_fresh())

    def _again(self, last: _Last, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor | None:
        """As the last time; None where that cannot be, with nothing computed. Whoever comes again may come often."""
        prepared = last.prepared
        if last.slots is None:
            return y
        if prepared is None:
            if last.slots.shape != y.shape[: last.slots.dim()]:
                return None
            prepared = prepare_checked(y, last.table, last.slots)
            if prepared is None:
                return None
            self._last = last._replace(prepared=prepared)
        elif is_looked_on():
            return None
        if is_fresh():
            return y if prepared(y) else None
        z = torch.empty_like(y)
        return z if prepared(y, z) else None

    def rests(self) -> bool:
        """Whether no slots are in force."""
        return self._routing.current() is None

    def _by_pairs(self, choice: Choice, y: Tensor, pairs: Pairs) -> Tensor:
        """As `by`, for pairs, which are others in every call, so that nothing is remembered of them."""
        is_compiled = torch.compiler.is_compiling()
        if not is_compiled and not choice.is_static and self.table.has_none(choice.host):
            return y
        slots = self.table.routed(pairs.placed(choice, self._site))
        chain, of_pairs = pairs.spread(self.table.current, slots, self._num_rotations)
        return rotate_checked(y, chain, of_pairs, Keep.INPUT, True)

    @property
    def prepared(self) -> PreparedRotation | None:
        """What has just rotated, made ready to be applied again."""
        return None if self._last is None else self._last.prepared

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


@dataclass(frozen=True, eq=False)
class Site:
    """One place that a bank can rotate.

    layer: the linear layer whose output it is, or whose input; or the experts. out_features: D. attach: from now on the site is
    given to what rotates there, such as a `LayerRotation`; gives what ends that. device: where the layer computes. experts: of
    stacked experts, which say how many rotations lie end to end.
    """

    layer: nn.Module
    out_features: int
    attach: Callable[[Any], Callable[[], None]]
    device: Callable[[], torch.device]
    experts: ExpertSite | None = None

    @classmethod
    def of_output(cls, layer: nn.Module) -> Site:
        """What a linear layer gives."""
        return cls(layer, out_features(layer) or 0, partial(_hook_output, layer), partial(_device_of, layer))

    @classmethod
    def of_input(cls, layer: nn.Module) -> Site:
        """What a linear layer is given."""
        return cls(layer, in_features(layer), partial(_hook_input, layer), partial(_device_of, layer))

    @classmethod
    def of_experts(cls, site: ExpertSite) -> Site:
        """What a projection of stacked experts gives."""
        experts = site.projection.experts
        return cls(experts, site.out_features, partial(attach, site), partial(_device_of, experts), site)

    @property
    def num_rotations(self) -> int:
        """How many rotations lie end to end in a slot."""
        return 1 if self.experts is None else self.experts.num_rotations

    def check(self, name: str, path: str, layer: LayerParameters) -> None:
        """Raise `AdapterError` where parameters of the adapter `name` do not fit this site, which is at `path`."""
        if layer.out_features != self.out_features:
            raise AdapterError(
                f"got adapter {name!r} with {layer.out_features} {'inputs' if is_input(path) else 'outputs'} for {path!r}; "
                f"wanted {self.out_features}; use its own base model"
            )
        if self.experts is not None:
            try:
                check_group_sizes(self.experts, layer.stages)
            except ConfigError as error:
                raise AdapterError(f"got adapter {name!r}, of which {path!r} does not fit: {error}") from None


def sites_in(model: nn.Module) -> dict[str, Site]:
    """Path in the base model -> every site of any model, held by hooks; inside PEFT's layers those of the base layer."""
    layers = {
        path_in_base(path): module
        for path, module in model.named_modules()
        if path and is_linear(module) and ".lora_" not in path
    }
    outputs = {path: Site.of_output(layer) for path, layer in layers.items()}
    inputs = {f"{path}{INPUT_SUFFIX}": Site.of_input(layer) for path, layer in layers.items()}
    experts = {path_in_base(path): Site.of_experts(site) for path, site in ExpertSite.in_model(model).items()}
    return {**outputs, **inputs, **experts}


def site_at(model: nn.Module, path: str) -> Site:
    """The one of `sites_in` at `path`, without a look at the others."""
    kind = experts_kind(path)
    if kind is not None:
        sites = ExpertSite.of(model.get_submodule(path.rpartition(".")[0]), kind)
        return Site.of_experts(next(site for site in sites if path.endswith(f".{site.name}")))
    layer = model.get_submodule(layer_of(path))
    return Site.of_input(layer) if is_input(path) else Site.of_output(layer)


def refused_in(model: nn.Module) -> dict[str, str]:
    """Path in the base model -> why the layer, and its input, cannot be rotated, or the experts."""
    reasons = {**refusals(model), **ExpertSite.refused_in(model)}
    return {path_in_base(path): reason for path, reason in reasons.items()}


def path_in_base(path: str) -> str:
    """Where a layer of a model, which PEFT may have wrapped, is in the base model."""
    return path.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def _device_of(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _hook_output(layer: nn.Module, rotation: Any) -> Callable[[], None]:
    def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        check_output(y, module, rotation.path)
        rotated: Tensor = rotation.of(y, lambda: gives_fresh_memory(module, num_hooks=1))  # this one
        return rotated

    return layer.register_forward_hook(hook).remove


def _hook_input(layer: nn.Module, rotation: Any) -> Callable[[], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return rotation.of(inputs[0], lambda: False), *inputs[1:]

    return layer.register_forward_pre_hook(hook).remove
