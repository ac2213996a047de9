"""Adapter weights on their way into a model: looked at before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn

from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX
from roadie.errors import CheckpointError, UnsafeCheckpointError
from roadie.rotation import parameter_size
from roadie.tuner.rotating import group_sizes_of, input_group_sizes_of

if TYPE_CHECKING:
    from roadie.tuner.config import WeightsSource
    from roadie.tuner.injection import Plan, Target


_pickle_allowed: ContextVar[bool] = ContextVar("roadie_pickle_allowed", default=False)


@contextmanager
def allow_pickle() -> Iterator[None]:
    """Within the block, adapters whose weights are a pickle may be loaded. A pickle can run code: only for files you trust."""
    token = _pickle_allowed.set(True)
    try:
        yield
    finally:
        _pickle_allowed.reset(token)


def check_weights_source(config: Any, plan: Plan) -> None:
    """Raise `CheckpointError` if the weights beside a config that was read from disk cannot be loaded into the plan.

    Nothing happens for configs that were not read, or that have no weights beside them.
    """
    source = getattr(config, "_source", None)
    folder = _folder(source) if source is not None else None
    if folder is None:
        return
    adapter = checkpoint.load(folder)
    for target in plan.targets:
        for path, stages, width in _sites(target):
            stored = adapter.layers.get(path)
            wanted = len(stages) * parameter_size(target.config.variant, width)
            if stored is not None and stored.theta.numel() != wanted:
                name = "out_features" if path == target.path else "in_features"
                raise CheckpointError(
                    f"got {stored.theta.numel()} parameters for {path!r} in {folder}; wanted {wanted} for "
                    f"{target.config.variant} on {name}={width}; the adapter belongs to another base "
                    "model or variant. The model was not changed."
                )


def _sites(target: Target) -> list[tuple[str, tuple[int, ...], int]]:
    """The output of a layer, and its input: path, group sizes (none where it is not rotated), and width."""
    stages, input_stages = group_sizes_of(target.config), input_group_sizes_of(target.config)
    return [
        (target.path, stages, target.out_features),
        (target.path + INPUT_SUFFIX, input_stages, target.in_features),
    ]


def _folder(source: WeightsSource) -> Path | None:
    """The folder with the weights, downloaded if need be; None where there is nothing to look at."""
    folder = Path(source.name_or_path, source.subfolder or "")
    if not folder.is_dir():
        downloaded = _download(source)
        if downloaded is None:
            return None
        folder = downloaded
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


def check_new_values(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` before a state dict is copied into a model: wrong shapes or non-finite values."""
    present = {name: parameter for name, parameter in model.named_parameters() if _is_road_key(name, adapter_name)}
    for name, value in state_dict.items():
        if not _is_road_key(name, adapter_name) or not isinstance(value, Tensor):
            continue
        parameter = present.get(name, present.get(name.removeprefix("base_model.model.")))
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
