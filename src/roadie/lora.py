"""RoAd adapters as LoRA adapters: for software that reads LoRA only.

A RoAd layer adds ``(R - I) W x + (R - I) b`` to its base layer, a LoRA layer ``B A x`` and, with `lora_bias`, a constant. The
best B A of a rank (Frobenius norm, Eckart and Young) are the largest singular values of ``(R - I) W``, or ``R W Q - W`` where the
input is rotated by Q; the constant is exact.
Rotations are rarely of low rank, so that the error is large unless the rank is: it is measured, on the tensors as they are
stored, and reported for each layer and for all.

    rank    a whole number: that rank in every layer (a smaller layer: its full rank, which is exact)
            a share between 0 and 1: in each layer the smallest rank that keeps this share of the squared singular values

Stored as PEFT stores LoRA, with a scale of 1, in float32 (float64 where the base weight is). Shapes: ``D`` outputs, ``r`` rank;
A ``[r, in]``, B ``[D, r]``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters, is_input, layer_of, refuse_experts
from roadie.adapter_algebra.layers import about_layer
from roadie.checkpoint.replacement import replace_pair
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, chain_from_parameters, rotate_weight, transposed


@dataclass(frozen=True)
class LayerFit:
    """How well LoRA does what RoAd does to one layer.

    rank: r; error, change: the squares of ``|C - B A|`` and ``|C|``, Frobenius norms, where C = ``R W Q - W`` is the change.
    """

    rank: int
    error: float
    change: float

    @property
    def relative_error(self) -> float:
        """``|C - B A| / |C|``; 0 where nothing was changed."""
        return math.sqrt(self.error / self.change) if self.change else 0.0


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter made of a RoAd adapter: tensors by their names in the file, config, and the fit of each layer."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    fits: Mapping[str, LayerFit]

    @property
    def relative_error(self) -> float:
        """The error over all layers together."""
        change = math.fsum(fit.change for fit in self.fits.values())
        return math.sqrt(math.fsum(fit.error for fit in self.fits.values()) / change) if change else 0.0

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def to_lora(adapter: Adapter, model: nn.Module, rank: int | float) -> LoraAdapter:
    """The LoRA adapter that is nearest to `adapter` on the base `model`; see the module for what `rank` says.

    model: the base model itself, not a PEFT model; its weights are read, a layer at a time. Raises `ConfigError` for a rank
    out of range, `AdapterError`, naming the layer, where the model lacks it or its weight cannot be read as a dense matrix.
    """
    _check_rank(rank)
    if adapter.other:
        raise AdapterError(
            f"got {len(adapter.other)} tensors that are no rotations ({next(iter(adapter.other))}); wanted none; make an Adapter "
            "of its layers alone"
        )
    refuse_experts(adapter.layers, "to_lora")
    linears = {}
    for path, layer in adapter.layers.items():
        with about_layer(path):
            linears[layer_of(path)] = _linear(model, path, layer)
    with_bias = any(linear.bias is not None for linear in linears.values())
    tensors, fits = {}, {}
    for path, linear in linears.items():
        sites = adapter.layers.get(path), adapter.layers.get(f"{path}{INPUT_SUFFIX}")
        with about_layer(path):
            down, up, bias, fits[path] = _factors(*sites, linear, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
        if with_bias:
            tensors[f"base_model.model.{path}.lora_B.bias"] = bias
    is_transposed = any(linear.is_transposed for linear in linears.values())
    return LoraAdapter(tensors, _config(adapter, fits, with_bias, is_transposed), fits)


def save_lora(lora: LoraAdapter, path: str | os.PathLike[str]) -> None:
    """Write it to the folder `path` as PEFT does (adapter_config.json, adapter_model.safetensors), whole or not at all."""
    text = json.dumps(dict(lora.config), indent=2, sort_keys=True)
    replace_pair(Path(path), text, {name: tensor.cpu().contiguous() for name, tensor in lora.tensors.items()})


@dataclass(frozen=True, eq=False)
class _Linear:
    """A base layer: weight ``[D, in]``, bias ``[D]`` or None; is_transposed: stored as ``[in, D]``."""

    weight: Tensor
    bias: Tensor | None
    is_transposed: bool


def _linear(model: nn.Module, path: str, layer: LayerParameters) -> _Linear:
    try:
        module = model.get_submodule(layer_of(path))
    except AttributeError:
        raise AdapterError("got a model without it; wanted the base model of the adapter") from None
    is_transposed = type(module).__name__ == "Conv1D"
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    is_linear = is_transposed or isinstance(module, nn.Linear)
    if not (is_linear and isinstance(weight, Tensor) and _is_dense(weight)):
        raise AdapterError(
            f"got a {type(module).__name__} whose weight is no dense matrix of floats; wanted a linear layer; load "
            "the model unquantised and on one device"
        )
    weight = weight.detach().mT if is_transposed else weight.detach()
    width, elements = (weight.shape[1], "inputs") if is_input(path) else (weight.shape[0], "outputs")
    if width != layer.out_features:
        raise AdapterError(
            f"got {width} {elements} in the model and {layer.out_features} in the adapter; wanted equal numbers; use the base "
            "model of the adapter"
        )
    return _Linear(weight, bias.detach() if isinstance(bias, Tensor) else None, is_transposed)


def _is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dim() == 2 and weight.device.type != "meta"


def _factors(
    of_output: LayerParameters | None, of_input: LayerParameters | None, linear: _Linear, rank: int | float
) -> tuple[Tensor, Tensor, Tensor, LayerFit]:
    """A, B, the constant, and how well B A fits; the singular values go to both, half and half."""
    weight = linear.weight.double()
    before, after = (_changes_of(site, linear.weight.device) for site in (of_input, of_output))
    delta = _changed(weight, [transposed(change) for change in reversed(before)], dim=1)
    delta = delta + _changed(weight + delta, after)
    dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    if not bool(torch.isfinite(delta).all()):
        raise AdapterError(
            "got a weight or parameters that are not finite; wanted finite numbers; check model and adapter"
        )
    left, values, right = torch.linalg.svd(delta.to(dtype), full_matrices=False)
    kept = _kept(values, rank)
    root = values[:kept].sqrt()
    down, up = root[:, None] * right[:kept], left[:, :kept] * root
    error = torch.linalg.vector_norm(delta - up.double() @ down.double())
    bias = delta.new_zeros(len(delta)) if linear.bias is None else _changed(linear.bias.double(), after)
    fit = LayerFit(kept, float(error) ** 2, float(torch.linalg.vector_norm(delta)) ** 2)
    return down.contiguous(), up.contiguous(), bias.to(dtype), fit


def _changes_of(site: LayerParameters | None, device: torch.device) -> list[Rotation]:
    """R - I of each stage, whose blocks are those of a Rotation too: nothing cancels where R is near I."""
    if site is None:
        return []
    theta, alpha = (values.to(device).double() for values in (site.theta, site.alpha))
    chain = chain_from_parameters(theta, alpha, site.variant, site.stages)
    return [Rotation(rotation.direct - 1, rotation.cross, rotation.group_size) for rotation in chain]


def _changed(weight: Tensor, changes: Sequence[Rotation], dim: int = 0) -> Tensor:
    """``R_K ... R_1 W - W``, from the R - I: each adds what it does to the weight that the ones before it made.

    dim: 1 where they turn the rows of W instead: ``W R_1^T ... R_K^T - W``.
    """
    delta = torch.zeros_like(weight)
    for change in changes:
        delta = delta + rotate_weight(weight + delta, change, dim=dim)
    return delta


def _kept(values: Tensor, rank: int | float) -> int:
    """How many of the descending singular `values` are kept."""
    if isinstance(rank, int):
        return min(rank, len(values))
    share = values.double().square().cumsum(0)
    return min(int((share < rank * share[-1]).sum()) + 1, len(values))


def _check_rank(rank: int | float) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ConfigError(
            f"got rank {rank!r}; wanted a whole number above 0, or a share of the change above 0 and at most 1.0"
        )


def _config(adapter: Adapter, fits: Mapping[str, LayerFit], with_bias: bool, is_transposed: bool) -> dict[str, Any]:
    rank, _ = Counter(fit.rank for fit in fits.values()).most_common()[0]
    # PEFT takes the first pattern that matches the end of a path: longer paths first, which end in shorter ones.
    others = sorted((path for path, fit in fits.items() if fit.rank != rank), key=lambda path: (-len(path), path))
    same = sorted(path for path in fits if path not in others)
    shadowed = any(path.endswith(f".{other}") for path in same for other in others)
    ranks = {re.escape(path): fits[path].rank for path in (sorted(fits, key=len, reverse=True) if shadowed else others)}
    kept = {
        key: adapter.config[key]
        for key in ("base_model_name_or_path", "revision", "task_type")
        if key in adapter.config
    }
    return kept | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "target_modules": sorted(fits),
        "lora_bias": with_bias,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "inference_mode": True,
    }
