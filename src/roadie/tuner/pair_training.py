"""Training some of the pairs: whatever trains the model, the parameters of all other pairs keep every bit.

    with train_only(model, "1/2"):
        trainer.train()

Within the block the gradients of the other pairs are set to 0 when they arrive, so that clipping, moments and accumulation
see the chosen pairs alone; and after every step of an optimiser the parameters of the other pairs are put back, which
weight decay and moments from before would move. Both are undone at the end of the block.

Legend: P pairs of a layer, n parameters of theta (and of alpha).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from roadie.adapter import is_input, layer_of, refuse_experts
from roadie.errors import ConfigError
from roadie.kernels.keeping import PLAIN
from roadie.share import Share
from roadie.subspaces import trained_places
from roadie.tuner.rotating import RoadLayer

logger = logging.getLogger("roadie")

Pairs = Share | Tensor


@contextmanager
def train_only(
    model: nn.Module, pairs: Share | str | Mapping[str, Tensor], adapter_name: str | None = None
) -> Iterator[int]:
    """Within the block only `pairs` of an adapter are trained; gives the number of parameters that are.

    model: a PeftModel, or any model with RoAd layers inside. pairs: a share of every layer ("1/2", "1/2 interleaved"), or a
    mask for each layer by its path in the base model, bool ``[P]``; a layer without a mask is not trained. adapter_name:
    None for the active adapter. Blocks for several adapters may be nested: rows of a mixed batch then train their own.

    Works with any optimiser and Trainer, in one process or with one copy of the model in each (DistributedDataParallel).
    Raises `ConfigError`, with nothing changed, for an unknown adapter or layer, a mask that does not fit, pairs that no
    layer has, an adapter that rotates inputs, or parameters that are spread over processes. Says so in the log where an
    optimiser made steps and no gradient came to the adapter: something else is trained in its place, such as the flat
    parameters of FSDP.
    """
    parts = _parts(model, pairs, _name(model, adapter_name))

    steps = 0

    def put_back(*_: Any) -> None:
        nonlocal steps
        steps += 1
        for part in parts:
            part.put_back()

    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.parameter.register_hook(part.masked).remove)
        stack.callback(register_optimizer_step_post_hook(put_back).remove)
        yield sum(part.size for part in parts)
        if steps and not any(part.is_reached for part in parts):
            logger.warning(
                "%d steps of an optimiser, and no gradient came to the pairs that train_only was given", steps
            )


@dataclass(eq=False)
class _Part:
    """One parameter ``[n]``, which of its places are trained, and what the others must keep."""

    parameter: nn.Parameter
    trained: Tensor
    kept: Tensor
    is_reached: bool = False

    @property
    def size(self) -> int:
        return int(self.trained.sum())

    def masked(self, gradient: Tensor) -> Tensor:
        self._follow(gradient)
        self.is_reached = True
        return gradient.masked_fill(~self.trained, 0.0)

    @torch.no_grad()
    def put_back(self) -> None:
        self._follow(self.parameter)
        self.parameter.copy_(torch.where(self.trained, self.parameter, self.kept))

    def _follow(self, tensor: Tensor) -> None:
        """Trainer may move the model after the block was entered."""
        if self.trained.device != tensor.device:
            self.trained, self.kept = self.trained.to(tensor.device), self.kept.to(tensor.device)


def _name(model: nn.Module, adapter_name: str | None) -> str:
    layers = _layers(model)
    known = sorted({name for layer in layers.values() for name in layer.road_theta})
    if adapter_name is None:
        active = sorted({name for layer in layers.values() for name in layer.active_adapters} & set(known))
        if len(active) != 1:
            raise ConfigError(f"got the active adapters {active}; wanted one; pass adapter_name, one of {known}")
        return active[0]
    if adapter_name not in known:
        raise ConfigError(f"got adapter {adapter_name!r}; wanted one of {known}; add it first")
    return adapter_name


def _layers(model: nn.Module) -> dict[str, RoadLayer]:
    """The RoAd layers by their paths in the base model."""
    base = next((module.model for module in model.modules() if isinstance(module, BaseTuner)), model)
    return {path: module for path, module in base.named_modules() if isinstance(module, RoadLayer)}


def _parts(model: nn.Module, pairs: Share | str | Mapping[str, Tensor], name: str) -> list[_Part]:
    layers = {path: layer for path, layer in _layers(model).items() if name in layer.road_theta}
    path = next((path for path in layers if is_input(path)), None)
    if path is not None:
        raise ConfigError(
            f"layer {layer_of(path)}: got adapter {name!r}, which rotates the layer's input; wanted outputs alone, whose "
            "pairs can be chosen; train without input_stages"
        )
    refuse_experts(layers, "train_only")
    chosen = _chosen(pairs, layers)
    parts = [part for path, layer in layers.items() for part in _parts_of(path, layer, name, chosen[path])]
    if not any(part.size for part in parts):
        shown = "masks" if isinstance(pairs, Mapping) else repr(str(pairs))
        raise ConfigError(f"got pairs={shown}, which no layer of adapter {name!r} has; wanted some to train")
    return parts


def _chosen(pairs: Share | str | Mapping[str, Tensor], layers: Mapping[str, RoadLayer]) -> dict[str, Pairs]:
    if not isinstance(pairs, Mapping):
        return dict.fromkeys(layers, Share.parse(pairs))
    unknown = sorted(set(pairs) - set(layers))
    if unknown:
        raise ConfigError(f"got a mask for {unknown[0]!r}; wanted adapted layers, such as {next(iter(layers), None)!r}")
    none = {path: torch.zeros(layer.out_features // 2, dtype=torch.bool) for path, layer in layers.items()}
    return {**none, **pairs}


def _parts_of(path: str, layer: RoadLayer, name: str, pairs: Pairs) -> list[_Part]:
    parameters = (layer.road_theta[name], layer.road_alpha[name])
    if not all(type(parameter) in PLAIN for parameter in parameters):
        raise ConfigError(
            f"layer {path}: got parameters of type {type(parameters[0]).__name__}; wanted plain ones: pairs cannot be chosen "
            "where a parameter is spread over processes; use DistributedDataParallel"
        )
    sizes = layer.variant[name], layer.out_features, layer.stages[name]
    try:
        places = trained_places(pairs, *sizes, device=parameters[0].device)
    except ConfigError as error:
        raise ConfigError(f"layer {path}: {error}") from None
    return [_Part(parameter, places, parameter.detach().clone()) for parameter in parameters]
