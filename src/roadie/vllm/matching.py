"""From an adapter, as its file names the layers, to the rotations of vLLM's layers on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import PPMissingLayer

from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters, layer_of, refuse_experts
from roadie.errors import AdapterError, ConfigError
from roadie.vllm.layers import RotatedLayer, Rotations, TableRotations

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class LayerRotations:
    """The rotations of one of vLLM's layers, of inputs and of outputs, under the names by which vLLM hands a layer its LoRA."""

    lora_a: TableRotations
    lora_b: TableRotations


def layer_rotations(adapter: Adapter, manager: Any) -> dict[str, LayerRotations]:
    """vLLM's name of a layer -> its rotations, for every layer of `adapter` that is on this device.

    manager: the `RoadModelManager` of this worker. Raises `AdapterError` or `ConfigError` for parameters other than
    rotations, for layers that the model does not have or that cannot be rotated, and for sizes that do not fit. Layers
    of other pipeline stages are looked at there.
    """
    _check_rotations_alone(adapter)
    layers = {_renamed(path, manager.model): (path, layer) for path, layer in adapter.layers.items()}
    found = {}
    for name, module in manager.modules.items():
        if isinstance(module, RotatedLayer):
            names = manager.packed_modules.get(name) or [name]
            inputs, outputs = ([_taken(layers, part, at, manager) for part in names] for at in (INPUT_SUFFIX, ""))
            if any(inputs) or any(outputs):
                of_inputs = _table_rotations(module.placed_inputs, inputs)
                found[name] = LayerRotations(of_inputs, _table_rotations(module.placed, outputs))
    _check_nothing_left(layers, manager.model)
    return found


def _check_rotations_alone(adapter: Adapter) -> None:
    refuse_experts(
        adapter.layers,
        "the vLLM plug-in, which does not rotate where vLLM's experts apply LoRA (LoRAExpertsMixin, which experts on CPUs lack)",
    )
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
    layer = layer_of(path)
    renamed = (get_rename_mapper() if get_rename_mapper else mapper)._map_name(layer)
    return path if renamed is None else f"{renamed}{path[len(layer) :]}"


_Part = tuple[str, LayerParameters] | None


def _taken(layers: dict[str, tuple[str, LayerParameters]], name: str, at: str, manager: Any) -> _Part:
    """The adapter's layer of that name, or of the name that it has in the text model alone, taken out of `layers`.

    at: `INPUT_SUFFIX` for the layer's input.
    """
    names = [f"{each}{at}" for each in (name, *_names_in_text_model(name, manager))]
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


def _table_rotations(placed: Callable[[Sequence[Rotations]], TableRotations], parts: list[_Part]) -> TableRotations:
    try:
        return placed([() if part is None else part[1].rotations for part in parts])
    except (AdapterError, ConfigError) as error:
        paths = ", ".join(part[0] for part in parts if part is not None)
        raise type(error)(f"{paths}: {error}") from None


def _check_nothing_left(layers: Mapping[str, tuple[str, LayerParameters]], model: Any) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    elsewhere = tuple(f"{name}." for name, module in modules.items() if isinstance(module, PPMissingLayer))
    problems = [
        f"{path} ({_why(layer_of(name), modules)})"
        for name, (path, _) in layers.items()
        if not f"{name}.".startswith(elsewhere)
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
