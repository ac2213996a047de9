"""Tensor parallelism: every process has a part of each layer, and the part of the adapter that turns its outputs.

    base, column-parallel   weight Shard(0), each process gives D / n outputs   theta, alpha: Shard(0)
    base, row-parallel      weight Shard(1), the sum over processes gives D     theta, alpha: Replicate()

The parameters become DTensors, so that clipping, optimizers and distributed checkpoints see whole adapters. A slice of the
outputs is a slice of theta and alpha, because both are stored group by group in every variant; but a group must not be cut, since
its members are pairs: every slice holds whole groups, or the model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from roadie.adapter import is_input, layer_of, refuse_experts
from roadie.distributed.layers import STORES, road_layers
from roadie.errors import ConfigError
from roadie.rotation import parameter_size

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh | None = None, plan: Mapping[str, str | ParallelStyle] | None = None
) -> nn.Module:
    """Make an adapted model tensor parallel, its adapters with it; the same model, changed in place.

    mesh: one-dimensional; None for a base that is tensor parallel already (transformers' tp_plan="auto"), whose mesh is used;
    plan: "colwise", "rowwise" or a style of torch by path in the base model, `*` for a number; None: the model's own, of which
    "colwise" and "rowwise" are used and everything else stays whole in each process. Make the optimizer afterwards.
    Raises `ConfigError`, with nothing changed, where a slice would cut a group, for layers in other slices than these, and for
    adapters that rotate inputs.
    """
    layers = road_layers(model)
    _refuse_inputs(layers)
    refuse_experts(layers, "tensor parallelism")
    done = _mesh_of(layers)
    if done is None and mesh is None:
        raise ConfigError("got no mesh for a model that is whole; wanted one; make it with torch's init_device_mesh")
    if done is not None and (plan is not None or mesh not in (None, done)):
        raise ConfigError(
            "got a mesh or a plan for a model that is tensor parallel already; wanted neither; leave them out"
        )
    mesh = done or mesh
    assert mesh is not None
    if mesh.ndim != 1:
        raise ConfigError(f"got a mesh of {mesh.ndim} dimensions; wanted one; name the dimension (mesh['tp'])")
    if done is None:
        styles = _styles_by_path(model, layers, plan)
        for path, layer in layers.items():
            if isinstance(styles.get(path), ColwiseParallel):
                _check_slices(path, layer, layer.out_features, mesh.size())
        _parallelize(model, layers, styles, mesh)
    else:
        for path, layer in layers.items():
            if _placement(path, layer) == Shard(0):
                _check_slices(path, layer, layer.get_base_layer().out_features, mesh.size())
    for path, layer in layers.items():
        _distribute(layer, _placement(path, layer), mesh)
    return model


def _refuse_inputs(layers: Mapping[str, Any]) -> None:
    path = next((path for path in layers if is_input(path)), None)
    if path is not None:
        raise ConfigError(
            f"{layer_of(path)}: got an adapter that rotates the layer's input (input_stages); wanted outputs alone: a layer "
            "that is cut by rows is given a part of its input, whose pairs are elsewhere; train it data parallel"
        )


def _mesh_of(layers: Mapping[str, Any]) -> DeviceMesh | None:
    """The mesh of a base that is tensor parallel already."""
    weights = (layer.get_base_layer().weight for layer in layers.values())
    return next((weight.device_mesh for weight in weights if isinstance(weight, DTensor)), None)


def _styles_by_path(
    model: nn.Module, layers: Mapping[str, Any], plan: Mapping[str, str | ParallelStyle] | None
) -> dict[str, ParallelStyle]:
    """The style of each linear layer that has one, by its path in `model`."""
    plan = plan if plan is not None else _own_plan(model)
    rules = [(re.compile(re.escape(rule).replace(r"\*", r"\d+")), style) for rule, style in plan.items()]
    styles: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or path in layers) or path.endswith(".base_layer"):
            continue
        style = next((style for rule, style in rules if re.search(rf"(^|\.){rule.pattern}$", path)), None)
        if isinstance(style, str):
            style = _STYLES[style]() if style in _STYLES else None
        if style is not None:
            styles[path] = style
    if not styles:
        raise ConfigError(
            f"got a plan ({', '.join(plan) or 'none'}) that fits no linear layer; wanted paths in the base model, such as "
            "{'layers.*.self_attn.q_proj': 'colwise', 'layers.*.self_attn.o_proj': 'rowwise'}"
        )
    return styles


def _own_plan(model: nn.Module) -> dict[str, str]:
    """What the model's config says of its layers; styles other than those of `_STYLES` are left out."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    plan = getattr(text, "base_model_tp_plan", None) or {}
    return {rule: style for rule, style in plan.items() if style in _STYLES}


def _check_slices(path: str, layer: Any, out_features: int, count: int) -> None:
    for name, (group_size, *others) in layer.stages.items():
        if others:
            raise ConfigError(
                f"{path}: got adapter {name!r} with rotations in a row (stages); wanted one rotation, since the parameters of "
                "several lie end to end; train it data parallel"
            )
        width, rest = divmod(out_features, count)
        if rest or width % group_size:
            raise ConfigError(
                f"{path}: got out_features={out_features} over {count} processes with group_size={group_size} ({name!r}); "
                f"wanted whole groups in every slice; use a group_size that divides {out_features} / {count}, or fewer processes"
            )


def _parallelize(
    model: nn.Module, layers: Mapping[str, Any], styles: Mapping[str, ParallelStyle], mesh: DeviceMesh
) -> None:
    for path, style in styles.items():
        module = model.get_submodule(f"{path}.base_layer" if path in layers else path)
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        parallelize_module(module, mesh, style)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])


def _placement(path: str, layer: Any) -> Placement:
    """Where theta and alpha of a layer belong, by its base layer's weight."""
    base = layer.get_base_layer()
    if not isinstance(base.weight, DTensor):
        return Replicate()
    (placement,) = base.weight.placements
    if type(placement) is Shard and placement.dim in (0, 1):
        return Shard(0) if placement.dim == 0 else Replicate()
    if isinstance(placement, Replicate):
        return Replicate()
    raise ConfigError(
        f"{path}: got a weight in slices of the kind {placement}; wanted one by columns or by rows; leave the layer out of "
        "target_modules"
    )


def _distribute(layer: Any, placement: Placement, mesh: DeviceMesh) -> None:
    """Make theta and alpha DTensors: whole parameters are cut, parts (of a base that was in parts before) are joined."""
    base = layer.get_base_layer()
    whole = int(base.out_features)
    for store in STORES:
        parameters = getattr(layer, store)
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                continue
            is_part = parameter.numel() != parameter_size(layer.variant[name], whole)
            with torch.no_grad():
                if is_part:
                    made = DTensor.from_local(parameter.detach(), mesh, [placement], run_check=False)
                else:
                    made = distribute_tensor(parameter.detach(), mesh, [placement])
            parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
    layer.out_features = whole // mesh.size() if placement == Shard(0) else whole
    layer.clear_cache()
