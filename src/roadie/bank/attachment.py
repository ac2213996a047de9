"""A bank's hold on one layer of a model: a forward hook that rotates what the layer returns.

It needs nothing of the model but a linear layer, and no PEFT; taking it off leaves the model as it was.

Legend: D out features, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from roadie.bank.routing import BankRouting, Choice
from roadie.bank.table import LayerTable
from roadie.kernels import (
    PreparedRotation,
    RotationTable,
    can_rotate_in_place,
    prepare_rotation,
    rotate_rows,
    rotate_rows_,
)


class Attachment:
    """One layer: its table, and the hook."""

    def __init__(self, module: nn.Module, table: LayerTable, routing: BankRouting) -> None:
        self.table, self._routing = table, routing
        self._gives_fresh_memory = type(module) is nn.Linear
        self._last: tuple[Choice, RotationTable, PreparedRotation] | None = None
        self._handle = module.register_forward_hook(self._rotate)

    def remove(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    def _rotate(self, module: nn.Module, inputs: Any, y: Tensor) -> Tensor | None:
        choice = self._routing.current()
        if choice is None:
            return None
        table = self.table.current
        if not torch.compiler.is_compiling() and self._is_rotated_as_before(y, choice, table):
            return y
        slots = choice.of(y)
        if self._is_fresh(module) and can_rotate_in_place(y, table):
            rotate_rows_(y, table, slots)
            prepared = prepare_rotation(y, table, slots)
            self._last = None if prepared is None else (choice, table, prepared)
            return y
        return rotate_rows(y, table, slots)

    def _is_rotated_as_before(self, y: Tensor, choice: Choice, table: RotationTable) -> bool:
        last = self._last
        if last is None or last[0] is not choice or last[1] is not table or torch.is_grad_enabled():
            return False
        return last[2].rotate_(y)

    def _is_fresh(self, module: nn.Module) -> bool:
        """Whether nobody else holds the output: a known kind of layer, on which ours is the only hook."""
        return (
            self._gives_fresh_memory
            and len(module._forward_hooks) == 1
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
    """D of a layer of `linear_layers`."""
    width = _out_features(module)
    assert width is not None
    return width
