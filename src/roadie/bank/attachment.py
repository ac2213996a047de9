"""A bank's hold on the layers of a model: what rotates a layer's output, and how it gets at it.

A plain model is held by forward hooks (`Hooks`); it needs nothing but linear layers, and no PEFT, and taking the hooks off leaves
it as it was. Layers that rotate their own output, such as the tuner's, are held by another `Hold`.

Legend: D out features, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roadie.bank.routing import BankRouting, Choice
from roadie.bank.servers import Server, serve, stop_serving
from roadie.bank.table import LayerTable
from roadie.kernels import (
    Chain,
    PreparedRotation,
    can_rotate_chain_in_place,
    prepare_chain,
    rotate_chain,
    rotate_chain_,
)


class LayerRotation:
    """One layer: its table, and the choice of the rows. A copy of a model has none: its bank is another's."""

    def __init__(self, table: LayerTable, routing: BankRouting) -> None:
        self.table, self._routing = table, routing
        self._last: tuple[Choice, Chain, PreparedRotation] | None = None

    def of(self, y: Tensor, is_fresh: Callable[[], bool]) -> Tensor:
        """y ``[B, ..., D]`` rotated by the slots in force, or y itself where none are.

        is_fresh: whether nobody else holds y, so that it may be written to.
        """
        choice = self._routing.current()
        if choice is None:
            return y
        table = self.table.current
        if not torch.compiler.is_compiling() and self._is_rotated_as_before(y, choice, table):
            return y
        slots = choice.of(y)
        if is_fresh() and can_rotate_chain_in_place(y, table):
            rotate_chain_(y, table, slots)
            prepared = prepare_chain(y, table, slots)
            self._last = None if prepared is None else (choice, table, prepared)
            return y
        return rotate_chain(y, table, slots)

    def _is_rotated_as_before(self, y: Tensor, choice: Choice, table: Chain) -> bool:
        last = self._last
        if last is None or last[0] is not choice or last[1] is not table or torch.is_grad_enabled():
            return False
        return last[2].rotate_(y)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Hold(Protocol):
    """How a bank gets at the layers of a model."""

    def open(self, model: nn.Module, server: Server) -> None:
        """Called once, when the bank is made."""
        ...

    def close(self, model: nn.Module) -> None:
        """Called when the bank is closed."""
        ...

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Path in the base model -> every layer that an adapter can rotate."""
        ...

    def device_of(self, layer: nn.Module) -> torch.device:
        """Where the layer computes."""
        ...

    def attach(self, layer: nn.Module, rotation: LayerRotation) -> Callable[[], None]:
        """From now on the layer's output is rotated; gives what ends that."""
        ...


class Hooks:
    """Forward hooks on the linear layers of any model, which `roadie.rows` then finds."""

    def open(self, model: nn.Module, server: Server) -> None:
        serve(model, server)

    def close(self, model: nn.Module) -> None:
        stop_serving(model)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Inside PEFT's layers the base layer."""
        return linear_layers(model)

    def device_of(self, layer: nn.Module) -> torch.device:
        return next(layer.parameters()).device

    def attach(self, layer: nn.Module, rotation: LayerRotation) -> Callable[[], None]:
        gives_fresh_memory = type(layer) is nn.Linear

        def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
            return rotation.of(y, lambda: gives_fresh_memory and _is_only_ours(module))

        return layer.register_forward_hook(hook).remove


def _is_only_ours(module: nn.Module) -> bool:
    """Whether nobody else holds the output of an nn.Linear: ours is the only hook."""
    return (
        len(module._forward_hooks) == 1
        and "forward" not in module.__dict__
        and not nn.modules.module._global_forward_hooks
        and type(module.weight.data) is Tensor
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path in the base model -> every layer of `model` that an adapter can rotate; inside PEFT's layers the base layer."""
    layers = {}
    for path, module in model.named_modules():
        if path and _out_features(module) is not None and ".lora_" not in path:
            layers[path.removeprefix("base_model.model.").removesuffix(".base_layer")] = module
    return layers


def _out_features(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    width = getattr(module, "nf", None)  # transformers' Conv1D
    return width if isinstance(width, int) and type(module).__name__ == "Conv1D" else None


def out_features_of(module: nn.Module) -> int:
    """D of a layer that a bank holds."""
    width = getattr(module, "out_features", None) or _out_features(module)
    assert isinstance(width, int)
    return width
