"""Watching linear layers while a model runs: what goes in and what comes out, and putting something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from roadie.errors import AdapterError, ConfigError
from roadie.fit.assembly import check_any
from roadie.fit.settings import ALL_LINEAR, Settings
from roadie.linear import check_named, is_linear, out_features, without_refused

Batch = Tensor | Mapping[str, Any]
"""What a model is called with: token ids, or keyword arguments."""
Watch = Callable[[str, Tensor, Tensor], Tensor | None]
"""Is given a layer's path, input and output; what it returns takes the place of the output."""


class Enough(Exception):
    """No error: raised by a watch when the rest of the forward is of no use."""


def linear_layers(model: nn.Module, settings: Settings) -> dict[str, nn.Module]:
    """The targeted linear layers by path, but never the output embeddings.

    Raises `ConfigError` where there is none, or the group size does not divide the outputs of one; `UnsupportedLayer` where
    one that cannot be adapted is named. "all-linear" leaves those out, and logs it.
    """
    head = getattr(model, "get_output_embeddings", None)
    output = head() if callable(head) else None
    linear = {path: module for path, module in model.named_modules() if is_linear(module) and module is not output}
    found = {path: module for path, module in linear.items() if settings.wants(path)}
    if settings.target_modules == ALL_LINEAR:
        found = {path: found[path] for path in without_refused(model, found)}
    else:
        check_named(model, found)
    check_any(found, settings, linear)
    for path, module in found.items():
        settings.of_layer(path, outputs_of(module))
    return found


def outputs_of(module: nn.Module) -> int:
    """D of a linear layer."""
    outputs = out_features(module)
    assert outputs is not None
    return outputs


@contextmanager
def watched(model: nn.Module, paths: Iterator[str] | Mapping[str, Any], watch: Watch) -> Iterator[None]:
    """Within it, `watch` sees every call of the layers at `paths`; raises `ConfigError` where the model lacks one."""
    handles = []
    try:
        for path in paths:
            handles.append(_submodule(model, path).register_forward_hook(_hook(path, watch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(path: str, watch: Watch) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    return lambda module, inputs, output: watch(path, inputs[0], output)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ConfigError(
            f"got a wanted model without {path}; wanted the modules of the base model; give two models of one kind"
        ) from None


def run(model: nn.Module, batch: Batch) -> None:
    """One forward, as far as the watches want it."""
    with suppress(Enough):
        model(**batch) if isinstance(batch, Mapping) else model(batch)


def rows_that_count(output: Tensor, batch: Batch) -> Tensor:
    """Outputs as columns ``[D, n]``: of all tokens, or of those that the batch's attention_mask does not mark with 0."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == output.shape[:-1]:
        return output[mask.to(output.device).bool()].mT
    return output.flatten(0, -2).mT


def check_alike(path: str, before: Tensor, after: Tensor) -> None:
    """Raise `AdapterError` unless both outputs have one shape."""
    if before.shape != after.shape:
        raise AdapterError(
            f"layer {path}: got outputs {list(after.shape)} in the wanted model and {list(before.shape)} in the base; wanted "
            "equal shapes; give two models of one kind"
        )


def on_one_device(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both where float64 can be computed."""
    device = torch.device("cpu") if before.device.type == "mps" else before.device
    return before.to(device), after.to(device)
