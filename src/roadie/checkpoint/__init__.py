"""Adapter files: PEFT's format, read and written without PEFT; safetensors only; replaced as a whole or not at all.

A checkpoint is a folder with two files:

    adapter_config.json          the config, JSON, indent 2, keys sorted; at most 1 MiB
    adapter_model.safetensors    base_model.model.<module path>.road_theta | .road_alpha   [n] each
                                 and other tensors (modules_to_save, trained biases), metadata {"format": "pt"}

**Bit for bit.** `load` keeps every tensor's dtype and bits and every key of the config; `save` of what `load` gave
writes both files byte for byte as stock PEFT 0.21 or roadie wrote them. Not kept, because neither writer produces
them: other metadata, another JSON layout, two spellings of one number, extra keys that hold their default.

**The prefix.** Where the config says more than stock PEFT understands (`EXTRA_DEFAULTS`), the file's variant reads
"roadie:road_1", so that stock PEFT raises "Invalid variant" where it would have loaded another meaning. Readers here
strip it, `config_text` puts it back. An extension that this reader must not ignore needs another prefix: chains of
several ``stages`` have "roadie-stages:", rotations of inputs (``input_stages``) "roadie-inputs:", those of stacked experts
(``target_experts``) "roadie-experts:", and `save` warns that only roadie reads them. The parameters of a chain lie end to end;
those of the input of the layer at P are at P.road_input; of the experts at P see `roadie.adapter`.

**One pair, never a mixture.** Both files are written and fsynced in a temporary folder beside the final ones. Where
the config does not change, the weights are replaced by one rename. Otherwise: old config out, old weights out, new
weights in, new config in. An exception puts the old files back. After a crash in between there is no config, so that
every reader refuses, and old and new files are still there in the temporary folder, which the error names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from roadie.adapter import (
    INPUT_SUFFIX,
    Adapter,
    LayerParameters,
    experts_kind,
    is_input,
    layer_of,
    out_features_of,
    resolve_layer,
    resolve_stages,
    resolve_variant,
    rotates_input,
    stages_at,
)
from roadie.checkpoint.config_file import config_bytes, config_text, parse_config, read_config
from roadie.checkpoint.layout import (
    CHAIN_KEYS,
    CHAIN_PREFIX,
    CONFIG_NAME,
    EXPERTS_KEY,
    EXTRA_DEFAULTS,
    INPUT_KEYS,
    INPUT_PREFIX,
    MAX_CONFIG_BYTES,
    VARIANT_PREFIX,
    WEIGHTS_NAME,
    parameter_name,
    prefix_for,
    without_prefix,
)
from roadie.checkpoint.refusal import about, refuse
from roadie.checkpoint.replacement import replace_pair
from roadie.checkpoint.weights_file import (
    check_finite,
    check_size,
    join_tensors,
    locate_weights,
    read_tensors,
    split_tensors,
)
from roadie.rotation import Variant, parameter_size

__all__ = [
    "CHAIN_KEYS",
    "CHAIN_PREFIX",
    "CONFIG_NAME",
    "EXTRA_DEFAULTS",
    "INPUT_KEYS",
    "INPUT_PREFIX",
    "MAX_CONFIG_BYTES",
    "VARIANT_PREFIX",
    "WEIGHTS_NAME",
    "config_text",
    "load",
    "locate_weights",
    "prefix_for",
    "read_config",
    "save",
    "verify",
    "warn_of_chains",
    "without_prefix",
]

_PROBLEMS_SHOWN = 3


def load(path: str | os.PathLike[str], *, max_weights_bytes: int | None = None) -> Adapter:
    """The adapter in the folder `path`, checked; tensors on the CPU, with the dtypes and bits of the file.

    max_weights_bytes: refuse a larger weights file before opening it (for files from strangers); None: no limit.
    The tensors are copies: nothing that later happens to the files changes them.
    Raises `CheckpointError` where a file is missing, corrupt, truncated, not RoAd, of wrong shapes, holds theta or alpha that are
    not finite, or rotates inputs or stacked experts where its config says otherwise, and
    `UnsafeCheckpointError` where the weights are a pickle. The values of `other` tensors are not looked at.
    """
    folder = Path(path)
    text = config_bytes(folder)
    config = parse_config(folder / CONFIG_NAME, text)
    weights = locate_weights(folder)
    check_size(weights, max_weights_bytes)
    tensors = read_tensors(weights)
    if config_bytes(folder) != text:
        refuse(folder / CONFIG_NAME, None, "a text that changed meanwhile", "files at rest", "load it again")
    pairs, other = split_tensors(weights, tensors)
    layers = {module: _layer(weights, config, module, pair) for module, pair in pairs.items()}
    _check_inputs(weights, config, layers)
    _check_experts(weights, config, layers)
    check_finite(weights, layers)
    return Adapter(layers, config, other)


def _layer(file: Path, config: Mapping[str, object], module: str, pair: Mapping[str, Tensor]) -> LayerParameters:
    theta, alpha = pair["theta"], pair["alpha"]
    with about(file, parameter_name(module, "theta")):
        variant = resolve_variant(config, module)
        num_stages = len(stages_at(config, module))
        stages = resolve_stages(config, module, out_features_of(variant, theta.numel(), num_stages))
        return LayerParameters(theta, alpha, variant, stages)


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write `adapter` to the folder `path` (made where missing); a checkpoint there is replaced as a whole.

    Other files in the folder are left alone. What `save` writes, `load` reads: raises `CheckpointError` where the
    config does not give a layer the variant and group size it has, values are not finite, names clash, or the disk
    refuses (full, read-only); the checkpoint that was there then stays whole. Raises `ConfigError` for a config that
    JSON cannot hold. Warns where the adapter has chains of several stages, or rotates inputs, which stock PEFT refuses to load.
    """
    folder = Path(path)
    text = config_text({"peft_type": "ROAD", **adapter.config})
    config = parse_config(folder / CONFIG_NAME, text.encode())
    check_finite(folder / WEIGHTS_NAME, adapter.layers)
    for module, layer in adapter.layers.items():
        _check_described(folder / CONFIG_NAME, config, module, layer)
    _check_inputs(folder / CONFIG_NAME, config, adapter.layers)
    _check_experts(folder / CONFIG_NAME, config, adapter.layers)
    warn_of_chains(config)
    replace_pair(folder, text, join_tensors(folder / WEIGHTS_NAME, adapter))


def warn_of_chains(config: Mapping[str, object]) -> None:
    """Say that roadie alone reads an adapter of this config, where it rotates several times in a row, inputs, or experts."""
    beyond = {
        "stages": ("several rotations in a row", CHAIN_KEYS),
        "input_stages": ("rotations of inputs", INPUT_KEYS),
        "target_experts": ("rotations of stacked experts", (EXPERTS_KEY,)),
    }
    found = [key for key, (_, keys) in beyond.items() if any(config.get(each) for each in keys)]
    if found:
        warnings.warn(
            f"this adapter has {' and '.join(f'{beyond[key][0]} ({key})' for key in found)}, which the format of PEFT's RoAd "
            "cannot express; it is saved so that roadie alone loads it, and stock PEFT refuses it. For stock PEFT, merge it, or "
            f"train without {' and '.join(found)}.",
            UserWarning,
            stacklevel=3,
        )


def _check_described(file: Path, config: Mapping[str, object], module: str, layer: LayerParameters) -> None:
    with about(file, module):
        variant, stages = resolve_layer(config, module, layer.out_features)
    if (variant, stages) != (layer.variant, layer.stages):
        refuse(
            file,
            module,
            f"a config that gives {variant.value}, {_shown(stages)}",
            f"what the layer has: {layer.variant.value}, {_shown(layer.stages)}",
            "set variant, group_size, stages or input_stages, or a pattern of one of them, in the config of the adapter",
        )


def _check_inputs(file: Path, config: Mapping[str, object], layers: Mapping[str, LayerParameters]) -> None:
    """Refuse inputs of layers that are not there, and layers without the rotation of their input that the config gives them."""
    for module in layers:
        if is_input(module) and layer_of(module) not in layers:
            got, wanted = (
                f"a rotation of its input, and nothing for layer {layer_of(module)}",
                "those of the layer's output too",
            )
            refuse(file, parameter_name(module, "theta"), got, wanted, "get the file again, or put the identity there")
        if not is_input(module) and module + INPUT_SUFFIX not in layers and rotates_input(config, module):
            missing = parameter_name(module + INPUT_SUFFIX, "theta")
            do = "get the file again, or give the layer [] in the input_stages_pattern of the config"
            refuse(
                file, missing, "nothing, and a config with input_stages for this layer", "both tensors of the input", do
            )


def _check_experts(file: Path, config: Mapping[str, object], layers: Mapping[str, LayerParameters]) -> None:
    """Refuse sites of stacked experts of another kind than the config says, and a config that says one without sites."""
    wanted = config.get(EXPERTS_KEY)
    found = {kind: path for path in layers if (kind := experts_kind(path)) is not None}
    if set(found) == ({wanted} if wanted else set()):
        return
    odd = next((path for kind, path in found.items() if kind != wanted), None)
    got = f"a config with target_experts={wanted!r}" + (" and no rotations of experts" if odd is None else "")
    do = "get the file again, or set target_experts to what the adapter has"
    refuse(
        file, None if odd is None else parameter_name(odd, "theta"), got, f"what it has: {sorted(found) or None}", do
    )


def _shown(stages: tuple[int, ...]) -> str:
    return f"group_size={stages[0]}" if len(stages) == 1 else f"stages={list(stages)}"


def verify(adapter: Adapter, out_features: Mapping[str, int], *, source: str | os.PathLike[str] = "adapter") -> None:
    """Raise `CheckpointError` unless `adapter` has exactly the layers of a model, each with its number of outputs.

    out_features: module path -> D of every layer that the adapter is to adapt; source: what the message calls it.
    Call it before a model is touched.
    """
    both = [path for path in adapter.layers if path in out_features]
    sizes = [_size_problem(path, adapter.layers[path], out_features[path]) for path in both]
    missing = [f"{path}: missing" for path in out_features if path not in adapter.layers]
    unknown = [f"{path}: not in the model" for path in adapter.layers if path not in out_features]
    problems = [problem for problem in sizes if problem] + missing + unknown
    if not problems:
        return
    more = f" and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
    refuse(
        Path(source),
        None,
        "; ".join(problems[:_PROBLEMS_SHOWN]) + more,
        f"parameters for the {len(out_features)} adapted layers of this model",
        f"use the base model of the adapter ({adapter.base_model_name or 'not named in its config'})",
    )


def _size_problem(path: str, layer: LayerParameters, wanted: int) -> str | None:
    if layer.out_features == wanted:
        return None
    of_one = layer.theta.numel() / len(layer.stages)
    fitting = [variant.value for variant in Variant if parameter_size(variant, wanted) == of_one]
    hint = f" (its size fits {fitting[0]})" if fitting else ""
    return f"{path}: {layer.out_features} outputs as {layer.variant.value}, the model has {wanted}{hint}"
