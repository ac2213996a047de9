"""From an adapter, as its file names the layers, to the rotations of vLLM's layers on this device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import PPMissingLayer

from roadie.adapter import Adapter, LayerParameters, refuse_experts, refuse_inputs
from roadie.errors import AdapterError, ConfigError
from roadie.vllm.layers import RotatedLayer, TableRotations

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class LayerRotations:
    """The rotations of one of vLLM's layers, under the names by which vLLM hands a layer its LoRA."""

    lora_a: TableRotations
    lora_b: None = None


def layer_rotations(adapter: Adapter, manager: Any) -> dict[str, LayerRotations]:
    """vLLM's name of a layer -> its rotations, for every layer of `adapter` that is on this device.

    manager: the `RoadModelManager` of this worker. Raises `AdapterError` or `ConfigError` for parameters other than
    rotations of outputs, for layers that the model does not have or that cannot be rotated, and for sizes that do not fit. Layers
    of other pipeline stages are looked at there.
    """
    _check_rotations_alone(adapter)
    layers = {_renamed(path, manager.model): (path, layer) for path, layer in adapter.layers.items()}
    found = {}
    for name, module in manager.modules.items():
        if isinstance(module, RotatedLayer):
            parts = [_taken(layers, part, manager) for part in manager.packed_modules.get(name) or [name]]
            if any(parts):
                found[name] = LayerRotations(_table_rotations(module, parts))
    _check_nothing_left(layers, manager.model)
    return found


def _check_rotations_alone(adapter: Adapter) -> None:
    refuse_inputs(adapter, "the vLLM plug-in")
    refuse_experts(adapter.layers, "the vLLM plug-in, whose fused experts leave no place between their projections")
    if adapter.other:
        raise AdapterError(
            f"got an adapter that also has {next(iter(adapter.other))}; vLLM serves rotations alone, no trained biases, "
            "tokens or whole modules; merge the adapter into a model of its own, or train it without them"
        )


def _renamed(path: str, model: Any) -> str:
    """`path`, of the model on disk, as vLLM names it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return path
    get_rename_mapper = getattr(mapper, "get_rename_mapper", None)
    renamed = (get_rename_mapper() if get_rename_mapper else mapper)._map_name(path)
    return path if renamed is None else str(renamed)


_Part = tuple[str, LayerParameters] | None


def _taken(layers: dict[str, tuple[str, LayerParameters]], name: str, manager: Any) -> _Part:
    """The adapter's layer of that name, or of the name that it has in the text model alone, taken out of `layers`."""
    names = [name, *_names_in_text_model(name, manager)]
    return next((layers.pop(each) for each in names if each in layers), None)


def _names_in_text_model(name: str, manager: Any) -> list[str]:
    """What a layer of a multimodal model's language part is called in adapters of the text model alone."""
    if not manager.supports_mm:
        return []
    prefix = manager.mm_mapping.language_model[0].rstrip(".") + "."
    inner = name.removeprefix(prefix)
    if inner == name:
        return []
    return [inner] if inner.startswith("model.") else [f"model.{inner}", inner]


def _table_rotations(module: Any, parts: list[_Part]) -> TableRotations:
    try:
        found: TableRotations = module.placed([None if part is None else part[1].rotation for part in parts])
    except (AdapterError, ConfigError) as error:
        paths = ", ".join(part[0] for part in parts if part is not None)
        raise type(error)(f"{paths}: {error}") from None
    return found


def _check_nothing_left(layers: Mapping[str, tuple[str, LayerParameters]], model: Any) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    elsewhere = tuple(f"{name}." for name, module in modules.items() if isinstance(module, PPMissingLayer))
    problems = [
        f"{path} ({_why(name, modules)})" for name, (path, _) in layers.items() if not f"{name}.".startswith(elsewhere)
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise AdapterError(
            f"got an adapter of layers that cannot be rotated here: {'; '.join(problems[:_SHOWN])}{more}; wanted linear "
            "layers of this model; use the adapter's own base model, or leave these layers out of the adapter"
        )


def _why(name: str, modules: Mapping[str, Any]) -> str:
    module = modules.get(name)
    return "not in the model" if module is None else f"a {type(module).__name__}, which the plug-in leaves to vLLM"
