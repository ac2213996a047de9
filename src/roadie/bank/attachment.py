"""A bank's hold on the layers of a model: what rotates a layer's output, or its input, and how it gets at it.

A plain model is held by forward hooks (`Hooks`); it needs nothing but linear layers, and no PEFT, and taking the hooks off leaves
it as it was. Layers that rotate by themselves, such as the tuner's, are held by another `Hold`.

A **site** is a layer's output, at the layer's path, or its input, at that path with `roadie.adapter.INPUT_SUFFIX`. Several layers
may be given one input, which is therefore never written to. The projections of stacked experts are sites too (`roadie.experts`).

Legend: D features of a site, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from roadie.adapter import INPUT_SUFFIX, PEFT_PREFIX, LayerParameters, is_input
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
from roadie.linear import check_output, in_features, is_linear, out_features, refusals
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

    routing: of the bank; site: the linear layer, or the experts, which is at `path`; num_rotations: end to end in a slot.
    """

    def __init__(
        self,
        table: SlotTable,
        routing: Routing[Choice],
        site: nn.Module,
        path: str = "an adapted layer",
        num_rotations: int = 1,
    ) -> None:
        self.table, self.path, self._routing, self._site = table, path, routing, site
        self._num_rotations = num_rotations
        self._last: _Last | None = None

    def of(self, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor:
        """y ``[B, ..., D]`` rotated by the slots in force, or y itself where none are, or none of them has a rotation here.

        is_fresh: whether nobody else holds y, so that it may be written to.
        """
        choice = self._routing.current()
        return y if choice is None else self.by(choice, y, is_fresh)

    def by(self, choice: Choice, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor:
        """As `of`, by this choice."""
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

    def of_pairs(self, y: Tensor, pairs: Pairs) -> Tensor:
        """As `of`, of what experts give to pairs of a token and an expert: y ``[P, D]``, which nobody else holds."""
        choice = self._routing.current()
        return y if choice is None else self.by_pairs(choice, y, pairs)

    def by_pairs(self, choice: Choice, y: Tensor, pairs: Pairs) -> Tensor:
        """As `of_pairs`, by this choice. Pairs are others in every call, so that nothing is remembered of them."""
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


class Hold(Protocol):
    """How a bank gets at the layers of a model."""

    def layers(self, model: nn.Module) -> Mapping[str, Any]:
        """Path in the base model -> every site that an adapter can rotate; its width as `out_features` (or a Conv1D's)."""
        ...

    def refusals(self, model: nn.Module) -> Mapping[str, str]:
        """Layer path in the base model -> why the layer, and its input, cannot be rotated."""
        ...

    def linear(self, layer: Any) -> nn.Module:
        """The linear layer that a site is the output of, or the input; or the experts."""
        ...

    def device_of(self, layer: Any) -> torch.device:
        """Where the site's layer computes."""
        ...

    def attach(self, layer: Any, rotation: LayerRotation) -> Callable[[], None]:
        """From now on the site is rotated; gives what ends that."""
        ...


@dataclass(frozen=True, eq=False)
class LayerInput:
    """The input of a linear layer as a site of its own."""

    layer: nn.Module

    @property
    def out_features(self) -> int:
        """D, the inputs of the layer."""
        return in_features(self.layer)


class Hooks:
    """Forward hooks on the linear layers of any model, and the turns of its stacked experts."""

    def layers(self, model: nn.Module) -> Mapping[str, Any]:
        """Inside PEFT's layers the base layer."""
        layers = linear_layers(model)
        inputs = {f"{path}{INPUT_SUFFIX}": LayerInput(layer) for path, layer in layers.items()}
        experts = {path_in_base(path): site for path, site in ExpertSite.in_model(model).items()}
        return {**layers, **inputs, **experts}

    def refusals(self, model: nn.Module) -> Mapping[str, str]:
        """Layers that the model does not call, or that give no tensor, and experts that cannot be adapted, with the reason."""
        reasons = {**refusals(model), **ExpertSite.refused_in(model)}
        return {path_in_base(path): reason for path, reason in reasons.items()}

    def linear(self, layer: nn.Module | LayerInput | ExpertSite) -> nn.Module:
        if isinstance(layer, ExpertSite):
            return layer.projection.experts
        return layer.layer if isinstance(layer, LayerInput) else layer

    def device_of(self, layer: nn.Module | LayerInput | ExpertSite) -> torch.device:
        return next(self.linear(layer).parameters()).device

    def attach(self, layer: nn.Module | LayerInput | ExpertSite, rotation: LayerRotation) -> Callable[[], None]:
        if isinstance(layer, ExpertSite):
            return attach(layer, rotation)
        if isinstance(layer, LayerInput):
            return layer.layer.register_forward_pre_hook(_input_hook(rotation)).remove
        gives_fresh_memory = type(layer) is nn.Linear

        def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
            check_output(y, module, rotation.path)
            return rotation.of(y, lambda: gives_fresh_memory and _is_only_ours(module))

        return layer.register_forward_hook(hook).remove


def _input_hook(rotation: LayerRotation) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return rotation.of(inputs[0], lambda: False), *inputs[1:]

    return hook


def _is_only_ours(module: nn.Module) -> bool:
    """Whether nobody else holds the output of an nn.Linear: ours is the only hook."""
    return (
        len(module._forward_hooks) == 1
        and "forward" not in module.__dict__
        and not nn.modules.module._global_forward_hooks
        and type(module.weight.data) is Tensor
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path in the base model -> every linear layer of `model`; inside PEFT's layers the base layer."""
    layers = {}
    for path, module in model.named_modules():
        if path and is_linear(module) and ".lora_" not in path:
            layers[path_in_base(path)] = module
    return layers


def path_in_base(path: str) -> str:
    """Where a layer of a model, which PEFT may have wrapped, is in the base model."""
    return path.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def out_features_of(module: Any) -> int:
    """D of a site that a bank holds."""
    width = getattr(module, "out_features", None) or out_features(module)
    assert isinstance(width, int)
    return width


def num_rotations_at(site: Any) -> int:
    """How many rotations lie end to end at a site that a bank holds: of experts, which are rotated apart."""
    return getattr(site, "num_rotations", 1)


def check_site(name: str, path: str, site: Any, layer: LayerParameters) -> None:
    """Raise `AdapterError` where parameters of the adapter `name` do not fit the site at `path`."""
    wanted = out_features_of(site)
    if layer.out_features != wanted:
        raise AdapterError(
            f"got adapter {name!r} with {layer.out_features} {'inputs' if is_input(path) else 'outputs'} for {path!r}; "
            f"wanted {wanted}; use its own base model"
        )
    if isinstance(site, ExpertSite):
        try:
            check_group_sizes(site, layer.stages)
        except ConfigError as error:
            raise AdapterError(f"got adapter {name!r}, of which {path!r} does not fit: {error}") from None
