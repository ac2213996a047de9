"""Adapters of one shape, their parameters stacked: what is trained at once as a few tensors.

Legend: L layers of one stack, S adapters of a family, n parameters of theta (and of alpha), those of all stages end to
end, D out features of a layer. Along the second dimension of a stack 0 is theta and 1 alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roadie.adapter import LayerParameters
from roadie.errors import AdapterError
from roadie.rotation import Variant, parameter_size
from roadie.share import Share
from roadie.subspaces import trained_places


class AdaptedLayer(NamedTuple):
    """One layer that an adapter adapts, or the input of one, and how.

    path: of the layer, or of its input (`roadie.adapter.INPUT_SUFFIX`), whose in_features are then the out_features here;
    stages: the group sizes of its chain; share: the pairs that are trained, None for all.
    """

    path: str
    out_features: int
    variant: Variant
    stages: tuple[int, ...]
    share: Share | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers of a family that are alike: values and moments of their parameters, ``[L, 2, S, n]`` each, float32.

    exp_avg, exp_avg_sq: the running means of AdamW; gradients: those of the next step; trained: which of the n
    places may move, bool ``[n]``, None for all.
    """

    paths: tuple[str, ...]
    out_features: int
    variant: Variant
    stages: tuple[int, ...]
    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradients: Tensor
    trained: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to go on later."""
        return {"parameters": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class Family:
    """Adapters of one shape and share: their names, in the order of the stacks' rows, and the stacks."""

    def __init__(self, layers: Sequence[AdaptedLayer], device: torch.device) -> None:
        self.layers = tuple(layers)
        self.names: list[str] = []
        self.stacks = [_empty_stack(alike, device) for alike in _by_shape(layers)]

    def add(self, names: Sequence[str]) -> None:
        """Append adapters, as the identity, with moments of zero."""
        stacks = [_mapped(stack, lambda tensor: _appended(tensor, len(names))) for stack in self.stacks]
        for stack in stacks:
            stack.parameters[:, 1, -len(names) :] = 1.0
        self.stacks = stacks  # where there is no memory for them, nothing has changed
        self.names.extend(names)

    def keep(self, names: Collection[str]) -> None:
        """Leave only the adapters `names`, in the order they have."""
        kept = [index for index, name in enumerate(self.names) if name in set(names)]
        self.names = [self.names[index] for index in kept]
        self.stacks = [_mapped(stack, lambda tensor: tensor[:, :, kept]) for stack in self.stacks]

    def put(self, name: str, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Make one adapter what `state` gave; raises `AdapterError` where that was not of these layers."""
        index = self.names.index(name)
        for stack, saved in zip(self.stacks, tensors, strict=True):
            for key, tensor in saved.items():
                into = stack.tensors[key][:, :, index]
                if tensor.shape != into.shape:
                    raise AdapterError(
                        f"got {key} {tuple(tensor.shape)}; wanted {tuple(into.shape)}; use the model it was saved for"
                    )
                into.copy_(tensor)

    def state(self, name: str) -> list[dict[str, Tensor]]:
        """Copies of what has to be kept of one adapter (`Stack.tensors`): ``[L, 2, n]`` each, for each stack."""
        index = self.names.index(name)
        return [{key: tensor[:, :, index].clone() for key, tensor in stack.tensors.items()} for stack in self.stacks]

    def row(self, name: str) -> list[Tensor]:
        """A copy of the parameters of one adapter: ``[L, 2, n]`` for each stack."""
        index = self.names.index(name)
        return [stack.parameters[:, :, index].clone() for stack in self.stacks]

    def adapter_layers(self, row: Sequence[Tensor]) -> dict[str, LayerParameters]:
        """The layers that a `row` stands for, in the order of the family's layers."""
        found = {
            path: LayerParameters(pair[0].cpu(), pair[1].cpu(), stack.variant, stack.stages)
            for stack, of_stack in zip(self.stacks, row, strict=True)
            for path, pair in zip(stack.paths, of_stack, strict=True)
        }
        return {layer.path: found[layer.path] for layer in self.layers}


def _by_shape(layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    alike: dict[tuple[object, ...], list[AdaptedLayer]] = {}
    for layer in layers:
        alike.setdefault(layer[1:], []).append(layer)
    return list(alike.values())


def _empty_stack(alike: Sequence[AdaptedLayer], device: torch.device) -> Stack:
    _, out_features, variant, stages, share = alike[0]
    shape = (len(alike), 2, 0, len(stages) * parameter_size(variant, out_features))
    tensors = {name: torch.zeros(shape, device=device) for name in ("parameters", "exp_avg", "exp_avg_sq", "gradients")}
    trained = None if share is None else trained_places(share, variant, out_features, stages, device=device)
    return Stack(tuple(layer.path for layer in alike), out_features, variant, stages, trained=trained, **tensors)


def _mapped(stack: Stack, change: Callable[[Tensor], Tensor]) -> Stack:
    """With what a change makes of each tensor; gradients too, since others join and leave between a gradient and its step."""
    before = {**stack.tensors, "gradients": stack.gradients}
    after: dict[str, Any] = {name: change(tensor).contiguous() for name, tensor in before.items()}
    return replace(stack, **after)


def _appended(tensor: Tensor, count: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros((*tensor.shape[:2], count, tensor.shape[3]))), dim=2)
