"""From a LoRA adapter (DoRA too) and its base: the change is known in factors, and never made whole.

    LoRA    e = s B A            s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    DoRA    e = (m / |h + s B A|) (h + s B A) - h    lengths over the inputs, one an output

A bias of B (lora_bias) changes the layer's bias, where it has one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadie import checkpoint
from roadie.adapter import matches_end
from roadie.checkpoint.refusal import about, refuse
from roadie.fit.assembly import FittedLayer, OnLayer, assemble, check_any, fit_layer
from roadie.fit.checkpoints import about_base, as_rows
from roadie.fit.closed_form import TILE_ELEMENTS, Tile, moments_of_tiles, tiling
from roadie.fit.places import LinearTensors, Place, linear_tensors, module_paths
from roadie.fit.report import Fit, NotFitted, Reason
from roadie.fit.settings import Settings
from roadie.fit.weights import FLOATS, StoredTensor, Weights, find_weights, json_object, tensors_in_file

_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|magnitude_vector)(\.weight)?"
)
_CHANGES_THE_BASE = re.compile("pissa|olora|corda|loftq", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Factors:
    """The LoRA parameters of a layer: down (A) ``[r, in]``, up (B) ``[D, r]``, bias and magnitude ``[D]`` where there are."""

    down: StoredTensor
    up: StoredTensor
    scale: float
    bias: StoredTensor | None = None
    magnitude: StoredTensor | None = None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All tensors there are."""
        return tuple(part for part in (self.down, self.up, self.bias, self.magnitude) if part is not None)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a LoRA adapter's folder holds: its config, the factors by module path, and the names of all other tensors."""

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def from_lora(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    places: Mapping[str, Place] | None = None,
    base_model_name: str | None = None,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> Fit:
    """The RoAd adapter that is nearest to what a LoRA adapter does to the weights of its base model (Frobenius).

    lora: a folder as PEFT saves it, safetensors only; base: as in `from_checkpoints`, and so are the other arguments;
    the targets are chosen among the layers of the LoRA adapter. Weights of modules_to_save, trained biases and adapted
    embeddings are reported as not fitted. Nothing is written.
    Raises `CheckpointError` where files are broken, the adapter is none of LoRA or DoRA, or does not fit the base model;
    otherwise as `from_checkpoints`.
    """
    chosen, file, weights = Settings(**settings), read_lora(lora), find_weights(base)
    found = _targets(file, weights, chosen, places)
    layers = (_fit_layer(layer, file.factors[path], chosen) for path, layer in found.items())
    left = [part.name for path, each in file.factors.items() if path not in found for part in each.parts]
    others = [NotFitted(name, Reason.NOT_A_TARGET) for name in (*left, *file.others)]
    name = base_model_name or file.config.get("base_model_name_or_path") or os.fspath(base)
    kept = {key: file.config[key] for key in ("task_type", "revision") if file.config.get(key)}
    return assemble(layers, module_paths(weights.tensors), chosen, about_base(weights, name) | kept, others, on_layer)


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """The LoRA adapter in a folder, headers only; raises `CheckpointError` where it is none, or more than low rank."""
    folder = Path(path)
    file = folder / checkpoint.CONFIG_NAME
    if not file.is_file():
        refuse(file, None, "no such file", f"a folder with {checkpoint.CONFIG_NAME} and its weights", "check the path")
    config = json_object(file)
    _check_kind(file, config)
    stored = tensors_in_file(checkpoint.locate_weights(folder))
    parts: dict[str, dict[str, StoredTensor]] = {}
    others = []
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None or len(tensor.shape) > 2:
            others.append(name)
        else:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    factors = {module: _factors(file, config, module, each) for module, each in parts.items()}
    return LoraFile(folder, config, factors, tuple(others))


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        got = repr(config.get("peft_type"))[:80]
        refuse(file, "peft_type", got, "'LORA'", "merge other adapters into their base and fit the whole model")
    init = str(config.get("init_lora_weights"))
    if _CHANGES_THE_BASE.search(init):
        do = "save it as an ordinary LoRA adapter (PEFT's path_initial_model_for_weight_conversion)"
        refuse(
            file, "init_lora_weights", f"{init}, which changes the base model", "a LoRA of the base model as it is", do
        )
    for key in ("layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config"):
        if config.get(key):
            do = "merge it into its base and fit the whole model"
            refuse(file, key, repr(config[key])[:80], "none: it is more than a change of each weight", do)


def _factors(file: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, StoredTensor]) -> Factors:
    down, up = parts.get("A.weight"), parts.get("B.weight")
    if down is None or up is None:
        refuse(file.parent, module, "one factor of two", "lora_A and lora_B", "get the file again")
    if down.shape[0] != up.shape[1]:
        refuse(up.file, up.name, f"rank {up.shape[1]}", f"{down.shape[0]}, that of lora_A", "get the file again")
    with about(file, module):
        alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
    rank = down.shape[0]
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(down, up, scale, parts.get("B.bias"), parts.get("magnitude_vector"))


def _setting(config: Mapping[str, Any], patterns: str, key: str, module: str) -> Any:
    for pattern, value in (config.get(patterns) or {}).items():
        if matches_end(pattern, module, patterns):
            return value
    return config.get(key, 8)


def _targets(
    file: LoraFile, base: Weights, settings: Settings, places: Mapping[str, Place] | None
) -> dict[str, LinearTensors]:
    """The layers to fit by module path, all checked from the headers before anything is read."""
    check_any({path: path for path in file.factors if settings.wants(path)}, settings, file.factors)
    by_path = {layer.place.path: layer for layer in linear_tensors(base, places or _places(file, base))}
    found = {}
    for path, factors in file.factors.items():
        if settings.wants(path):
            if path not in by_path:
                do = "check that this is its base model; a layer that is no linear one can be left out of the targets"
                refuse(base.folder, f"{path}.weight", "no such weight", "the layers that the adapter changes", do)
            _check_shapes(by_path[path], factors)
            settings.of_layer(path, by_path[path].outputs)
            found[path] = by_path[path]
    return found


def _places(file: LoraFile, base: Weights) -> dict[str, Place]:
    """The layers of the adapter are linear layers of the base, whatever they are called."""
    transposed = bool(file.config.get("fan_in_fan_out"))
    return {path: Place(path, transposed) for path in file.factors if f"{path}.weight" in base.tensors}


def _check_shapes(layer: LinearTensors, factors: Factors) -> None:
    inputs = layer.columns - (layer.bias is not None)
    rank = factors.down.shape[0]
    wanted: dict[StoredTensor, tuple[int, ...]] = {factors.down: (rank, inputs), factors.up: (layer.outputs, rank)}
    wanted |= {part: (layer.outputs,) for part in (factors.bias, factors.magnitude) if part is not None}
    for stored, shape in wanted.items():
        if stored.shape != shape:
            do = "check that this is its base model"
            refuse(stored.file, stored.name, f"shape {list(stored.shape)}", f"{list(shape)}, as the base has it", do)
    for stored in (layer.weight, *factors.parts):
        if stored.dtype not in FLOATS:
            do = "use the base model that is not quantised"
            refuse(stored.file, stored.name, f"dtype {stored.dtype}", f"one of {', '.join(FLOATS)}", do)


def _fit_layer(layer: LinearTensors, factors: Factors, settings: Settings) -> FittedLayer:
    path = layer.place.path
    _, group_size = settings.of_layer(path, layer.outputs)
    moments = moments_of_tiles(_tiles(layer, factors, group_size), layer.outputs, group_size, torch.device("cpu"))
    if not moments.is_finite:
        refuse(
            layer.weight.file, path, "numbers that are not finite, here or in the adapter", "finite ones", "check both"
        )
    wide = any(stored.dtype == "F64" for stored in (layer.weight, factors.up))
    return fit_layer(path, moments, settings, torch.float64 if wide else torch.float32)


def _tiles(layer: LinearTensors, factors: Factors, group_size: int) -> Iterator[Tile]:
    weight = as_rows(layer.weight.read(), layer.place)
    down, up = factors.down.read().double(), factors.up.read().double() * factors.scale
    growth = None if factors.magnitude is None else _growth(weight, down, up, factors.magnitude.read())
    for where, columns in tiling(weight.shape[0], weight.shape[1], group_size):
        rows = weight[where, columns].double()
        change = up[where] @ down[:, columns]
        if growth is not None:
            change = growth[where, None] * (rows + change) - rows
        yield where, rows, change
    if layer.bias is not None:
        yield from _bias_tiles(layer.bias.read(), factors, group_size)


def _growth(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA multiplies each row of the changed weight by, ``[D]``."""
    height = max(1, TILE_ELEMENTS // weight.shape[1])
    lengths = [
        torch.linalg.vector_norm(weight[top : top + height].double() + up[top : top + height] @ down, dim=1)
        for top in range(0, len(weight), height)
    ]
    return magnitude.double() / torch.cat(lengths)


def _bias_tiles(bias: Tensor, factors: Factors, group_size: int) -> Iterator[Tile]:
    rows = bias.double()[:, None]
    change = torch.zeros_like(rows)
    if factors.bias is not None:
        change += factors.bias.read().double()[:, None] * factors.scale
    for where, columns in tiling(len(rows), 1, group_size):
        yield where, rows[where, columns], change[where, columns]
