"""Adapter weights on their way into a model: looked at before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX, PEFT_PREFIX, Adapter
from roadie.errors import CheckpointError, UnsafeCheckpointError
from roadie.rotation import parameter_size
from roadie.tuner.rotating import group_sizes_of, input_group_sizes_of

if TYPE_CHECKING:
    from roadie.tuner.config import WeightsSource
    from roadie.tuner.injection import Plan


_pickle_allowed: ContextVar[bool] = ContextVar("roadie_pickle_allowed", default=False)


@contextmanager
def allow_pickle() -> Iterator[None]:
    """Within the block, adapters whose weights are a pickle may be loaded. A pickle can run code: only for files you trust."""
    token = _pickle_allowed.set(True)
    try:
        yield
    finally:
        _pickle_allowed.reset(token)


def source_of_load(config: Any) -> WeightsSource | None:
    """Where PEFT is about to read the weights of the adapter that this config is for; None for a new adapter."""
    return getattr(config, "_source", None) if getattr(config, "_is_for_loading", False) else None


def make_new(config: Any, model: nn.Module) -> bool:
    """Of a config that was read, for a new adapter: what the file says of another adapter's use and base model is left out.

    Gives whether it was read.
    """
    source = getattr(config, "_source", None)
    if source is None:
        return False
    config._source = None
    config.inference_mode = False
    config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path != source.base_model:
        config.revision = None
    return True


def stored_adapter(source: WeightsSource, *, is_certain: bool) -> Adapter | None:
    """The adapter that is about to be loaded, checked as a file; None where there is nothing to look at.

    is_certain: False where the config may be meant for a new adapter all the same. Raises `CheckpointError` where its file cannot
    be read, or is certain to be missing.
    """
    folder = _folder(source)
    if folder is not None:
        return checkpoint.load(folder)
    place = Path(source.name_or_path, source.subfolder or "")
    if is_certain and place.is_dir() and not any(place.glob("adapter_model.*")):
        raise CheckpointError(
            f"Can't find weights for {source.name_or_path} in {place}. Wanted {checkpoint.WEIGHTS_NAME} beside "
            f"{checkpoint.CONFIG_NAME}; save the adapter again. The model was not changed."
        )
    return None


def check_stored_sizes(stored: Adapter, plan: Plan, place: str) -> None:
    """Raise `CheckpointError` if the parameters of a layer do not fit into the plan; place: where they were read."""
    for target in plan.targets:
        output = target.path, group_sizes_of(target.config), "out_features"
        input_ = target.path + INPUT_SUFFIX, input_group_sizes_of(target.config), "in_features"
        for path, stages, name in (output, input_):
            layer, width = stored.layers.get(path), getattr(target, name)
            wanted = len(stages) * parameter_size(target.config.variant, width)
            if layer is not None and layer.theta.numel() != wanted:
                raise CheckpointError(
                    f"got {layer.theta.numel()} parameters for {path!r} in {place}; wanted {wanted} for "
                    f"{target.config.variant} on {name}={width}; the adapter belongs to another base "
                    "model or variant. The model was not changed."
                )


def check_whole_modules(stored: Adapter, model: nn.Module, adapter_name: str, place: str) -> None:
    """Raise `CheckpointError` if a file has too few tensors for what an adapter of the model trains whole; PEFT asks for each."""
    wanted = {
        f"{PEFT_PREFIX}{path}.{key}"
        for path, wrapper in model.named_modules()
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters
        for key in wrapper.adapter_state_dict_load_map(adapter_name)
    }
    missing = sorted(wanted - set(stored.other))
    if len(missing) > len(set(stored.other) - wanted):  # others may be renamed on their way, by a key_mapping
        raise CheckpointError(
            f"got no {missing[0]} in {place}; wanted the tensors of all modules that the adapter trains whole ("
            f"modules_to_save, the head of the task, trainable_token_indices); it was saved by another task or version. "
            "The model was not changed."
        )


def _folder(source: WeightsSource) -> Path | None:
    """The folder with the weights, downloaded if need be; None where there is nothing to look at."""
    local = Path(source.name_or_path, source.subfolder or "")
    folder = local if local.is_dir() else _download(source)
    if folder is None:
        return None
    if (folder / checkpoint.WEIGHTS_NAME).is_file():
        return folder
    if not _may_be_pickle(source) and any(folder.glob("adapter_model.bin")):
        checkpoint.locate_weights(folder)  # raises, and says why
    return None


def _may_be_pickle(source: WeightsSource) -> bool:
    return source.allow_pickle or _pickle_allowed.get()


def _download(source: WeightsSource) -> Path | None:
    name = f"{source.subfolder}/{checkpoint.WEIGHTS_NAME}" if source.subfolder else checkpoint.WEIGHTS_NAME
    arguments = {key: value for key, value in source.hub_arguments.items() if key != "subfolder"}
    try:
        return Path(hf_hub_download(source.name_or_path, name, **arguments)).parent
    except (EntryNotFoundError, LocalEntryNotFoundError) as error:
        if _may_be_pickle(source) or isinstance(error, LocalEntryNotFoundError):
            return None
        raise UnsafeCheckpointError(
            f"got no {checkpoint.WEIGHTS_NAME} in {source.name_or_path}; wanted safetensors: what PEFT would read instead "
            "is a pickle, which can run code; convert it, or pass allow_pickle=True if you trust its author"
        ) from error


def placed(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], remap: Callable[[Any], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """A file's tensors under their names in the model; `remap` is PEFT's way there, for names of the model's layout.

    Keys of an older layout of the model are renamed as transformers renames those of its weights. Raises `CheckpointError` where
    tensors of RoAd find no place; warns of others that find none.
    """
    names = set(model.state_dict())

    def lost(tensors: Mapping[str, Tensor]) -> list[str]:
        return [key for key in tensors if key not in names and key.removeprefix(PEFT_PREFIX) not in names]

    found = remap(state_dict)
    if lost(found):
        known = {id(tensor) for key, tensor in found.items() if key in set(lost(found))}
        to_rename = [key for key, tensor in state_dict.items() if id(tensor) in known]
        new_names = _in_todays_layout(model, to_rename)
        found = remap({new_names.get(key, key): tensor for key, tensor in state_dict.items()})
    nowhere = lost(found)
    of_road = [key for key in nowhere if ".road_theta" in key or ".road_alpha" in key]
    if of_road:
        raise CheckpointError(
            f"got {len(of_road)} tensors that no adapted layer of the model has a place for, such as {of_road[0]}; wanted those "
            f"of the layers that {adapter_name!r} adapts here; it was saved for another model, or another layout of this one: "
            "load it with the versions that saved it, or pass key_mapping={pattern: replacement}. Nothing was loaded."
        )
    if nowhere:
        warnings.warn(
            f"Tensors of adapter {adapter_name!r} that the model has no place for were not loaded: {nowhere}.",
            stacklevel=2,
        )
    return found


def warn_of_missing(model: nn.Module, adapter_name: str, found: Collection[str]) -> None:
    """Warn, as PEFT's from_pretrained does, of layers that an adapter has in the model and not in its file: the identity."""
    missing = [name for name, _ in model.named_parameters() if _is_road_key(name, adapter_name) and name not in found]
    if missing:
        warnings.warn(f"Found missing adapter keys while loading the checkpoint: {missing}.", stacklevel=2)


def _in_todays_layout(model: Any, keys: list[str]) -> dict[str, str]:
    """The keys as transformers names them in today's layout of a model, where that is another one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    renamings = [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]
    new = {key: rename_source_key(key.removeprefix(PEFT_PREFIX), renamings, [])[0] for key in keys}
    return {key: PEFT_PREFIX + name for key, name in new.items()}


class _WrongSize(CheckpointError, RuntimeError):
    """torch raises a RuntimeError for a size that does not fit."""


def check_sizes_of_values(module: nn.Module, prefix: str, state_dict: Mapping[str, Any]) -> None:
    """Raise, as torch does, where a state dict has a tensor of another size than the module; changes nothing."""
    for name, parameter in module.named_parameters():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and type(parameter.data) is Tensor and value.shape != parameter.shape:
            raise _WrongSize(
                f"Error(s) in loading state_dict: size mismatch for {prefix}{name}: got {tuple(value.shape)}; wanted "
                f"{tuple(parameter.shape)}; the adapter was trained for another task or base model (ignore_mismatched_sizes=True "
                "leaves such tensors out). The model was not changed."
            )


def check_new_values(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` before a state dict is copied into a model: wrong shapes or non-finite values."""
    present = {name: parameter for name, parameter in model.named_parameters() if _is_road_key(name, adapter_name)}
    for name, value in state_dict.items():
        if not _is_road_key(name, adapter_name) or not isinstance(value, Tensor):
            continue
        parameter = present.get(name, present.get(name.removeprefix(PEFT_PREFIX)))
        if parameter is not None and type(parameter.data) is Tensor and parameter.shape != value.shape:
            raise CheckpointError(
                f"got {name} of shape {tuple(value.shape)}; wanted {tuple(parameter.shape)}; the adapter was trained with "
                "another variant, group size or base model. The model's values were not changed."
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"got non-finite values in {name}; wanted finite theta and alpha; the adapter diverged in training or the "
                "file is damaged. The model's values were not changed."
            )


def _is_road_key(name: str, adapter_name: str) -> bool:
    return name.endswith((f".road_theta.{adapter_name}", f".road_alpha.{adapter_name}"))
