"""From a base and a fully fine-tuned checkpoint: every targeted weight is read once, a pair of tensors at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from roadie.checkpoint.refusal import refuse
from roadie.fit.assembly import FittedLayer, OnLayer, assemble, check_any, fit_layer
from roadie.fit.closed_form import TILE_ELEMENTS, Tile, moments_of_tiles, tiles_between
from roadie.fit.places import LinearTensors, Place, is_embedding, linear_tensors, module_paths
from roadie.fit.report import Fit, NotFitted, Reason
from roadie.fit.settings import Settings
from roadie.fit.weights import FLOATS, StoredTensor, Weights, find_weights

Pair = tuple[LinearTensors, LinearTensors]
"""A layer in the base, and the same layer in the tuned model."""


def from_checkpoints(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    places: Mapping[str, Place] | None = None,
    base_model_name: str | None = None,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> Fit:
    """The RoAd adapter that is nearest to what fine-tuning did to each linear layer: least ``|[W' b'] - R [W b]|`` (Frobenius).

    base, tuned: folders with model.safetensors or model.safetensors.index.json, cut into shards as they like, in float16,
    bfloat16, float32 or float64 each; settings: see `Settings`; places: which tensors are linear layers of which modules,
    None: told from the names; base_model_name: for the adapter's config, without it `base`; on_layer: is told of every layer.
    Parameters are float32, or float64 where a checkpoint is. Nothing is written.
    Raises `CheckpointError` where files are broken, a targeted tensor is missing, has another shape, is quantised or not
    finite; `ConfigError` for settings that do not fit; `AdapterError` where there is nothing to fit.
    """
    chosen, before, after = Settings(**settings), find_weights(base), find_weights(tuned)
    pairs = _pairs(before, after, chosen, places)
    layers = (_fit_pair(pair, chosen) for pair in pairs.values())
    others = _others(before, after, pairs)
    about = about_base(before, base_model_name or os.fspath(base))
    return assemble(layers, _modules(before, places), chosen, about, others, on_layer)


def about_base(base: Weights, name: str) -> dict[str, Any]:
    """What an adapter's config says of its base model."""
    architectures = base.config.get("architectures")
    causal = isinstance(architectures, list) and any(str(each).endswith("ForCausalLM") for each in architectures)
    return {"base_model_name_or_path": name, "task_type": "CAUSAL_LM" if causal else None}


def _modules(base: Weights, places: Mapping[str, Place] | None) -> set[str]:
    paths = module_paths(base.tensors)
    return paths if places is None else paths | {place.path for place in places.values()}


def _pairs(base: Weights, tuned: Weights, settings: Settings, places: Mapping[str, Place] | None) -> dict[str, Pair]:
    """The targeted layers by module path, all checked from the headers before anything is read."""
    linear = {layer.place.path: layer for layer in linear_tensors(base, places)}
    found = {path: layer for path, layer in linear.items() if settings.wants(path)}
    check_any(found, settings, linear)
    for path, layer in found.items():
        settings.of_layer(path, layer.outputs)
    return {path: (layer, _same_layer(layer, tuned)) for path, layer in found.items()}


def _same_layer(layer: LinearTensors, tuned: Weights) -> LinearTensors:
    weight = _same_tensor(layer.weight, tuned)
    return LinearTensors(layer.place, weight, None if layer.bias is None else _same_tensor(layer.bias, tuned))


def _same_tensor(stored: StoredTensor, tuned: Weights) -> StoredTensor:
    """The tensor of that name in the tuned model, both of a kind that can be fitted."""
    other = tuned.tensors.get(stored.name)
    if other is None:
        do = "save both models with the same class, and all tensors; or leave the layer out of the targets"
        refuse(tuned.folder, stored.name, "no such tensor", "every targeted tensor of the base model", do)
    for each in (stored, other):
        if each.dtype not in FLOATS:
            do = "fit the models before they are quantised"
            refuse(each.file, each.name, f"dtype {each.dtype}", f"one of {', '.join(FLOATS)}", do)
    if other.shape != stored.shape:
        wanted = f"{list(stored.shape)}, as in the base"
        refuse(other.file, other.name, f"shape {list(other.shape)}", wanted, "check that this is its base model")
    return other


def _fit_pair(pair: Pair, settings: Settings) -> FittedLayer:
    base, tuned = pair
    _, group_size = settings.of_layer(base.place.path, base.outputs)
    moments = moments_of_tiles(_tiles(pair, group_size), base.outputs, group_size, torch.device("cpu"))
    if not moments.is_finite:
        _refuse_not_finite(pair)
    wide = any(stored.dtype == "F64" for stored in (base.weight, tuned.weight))
    return fit_layer(base.place.path, moments, settings, torch.float64 if wide else torch.float32)


def _tiles(pair: Pair, group_size: int) -> Iterator[Tile]:
    """Tiles of the weight, then of the bias as one more column."""
    for name in ("weight", "bias"):
        stored = [getattr(layer, name) for layer in pair]
        if stored[0] is not None:
            before, after = (as_rows(each.read(), pair[0].place) for each in stored)
            yield from tiles_between(before, after, group_size)


def as_rows(tensor: Tensor, place: Place) -> Tensor:
    """A weight as ``[outputs, inputs]``, a bias as ``[outputs, 1]``; a view."""
    if tensor.dim() == 1:
        return tensor[:, None]
    return tensor.mT if place.transposed else tensor


def _refuse_not_finite(pair: Pair) -> None:
    stored = [part for layer in pair for part in (layer.weight, layer.bias) if part is not None]
    for each in stored:
        bad = int((~torch.isfinite(each.read())).sum())
        if bad:
            refuse(
                each.file, each.name, f"{bad} values that are not finite", "finite numbers", "use another checkpoint"
            )
    refuse(stored[0].file, stored[0].name, "values whose squares are not finite", "smaller ones", "scale the weights")


def _others(base: Weights, tuned: Weights, pairs: Mapping[str, Pair]) -> Iterator[NotFitted]:
    """Every tensor that is no part of a targeted layer, where it changed."""
    fitted = {part.name for layer, _ in pairs.values() for part in (layer.weight, layer.bias) if part is not None}
    for name in dict.fromkeys((*base.tensors, *tuned.tensors)):
        before, after = base.tensors.get(name), tuned.tensors.get(name)
        if name in fitted:
            continue
        if before is None or after is None:
            if not _is_tied(name, tuned if before is None else base):
                yield NotFitted(name, Reason.ADDED if before is None else Reason.REMOVED)
        elif before.shape != after.shape:
            yield NotFitted(name, Reason.SHAPE)
        elif change := norm_of_change(before.read(), after.read()):
            yield NotFitted(name, Reason.NOT_A_TARGET, change if math.isfinite(change) else None)


def norm_of_change(before: Tensor, after: Tensor) -> float:
    """``|after - before|`` in float64, a part at a time; not finite where they differ in numbers that are not."""
    squares = 0.0
    for one, other in zip(before.flatten().split(TILE_ELEMENTS), after.flatten().split(TILE_ELEMENTS), strict=True):
        if one.dtype != other.dtype or not torch.equal(one, other):
            squares += float((other.double() - one.double()).square().sum())
    return math.sqrt(squares)


def _is_tied(name: str, weights: Weights) -> bool:
    """Whether a tensor is a copy of an embedding: one of two tied tensors, of which the other model stores one."""
    stored = weights.tensors[name]
    return is_embedding(name) and any(
        other.shape == stored.shape and is_embedding(other.name) and torch.equal(stored.read(), other.read())
        for other in weights.tensors.values()
        if other.name != name
    )
