"""adapter_model.safetensors: the names of its tensors, and reading it; nothing here ever opens a pickle.

A module path P is stored as ``base_model.model.P.road_theta`` and ``base_model.model.P.road_alpha``, without the
adapter's name. Every tensor under another name is "other": its owner is not RoAd, and its bits are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roadie.adapter import Adapter, LayerParameters
from roadie.checkpoint.layout import PARAMETER, STRAY, WEIGHTS_NAME, parameter_name
from roadie.checkpoint.refusal import reading, refuse, shown
from roadie.errors import UnsafeCheckpointError

_NOT_FOR_OTHERS = ("__metadata__",)
_COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that have an order in torch

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_GIT_LFS_START = b"version https://git-lfs"


def locate_weights(path: str | os.PathLike[str]) -> Path:
    """The weights file of the folder `path`; opens nothing.

    Raises `UnsafeCheckpointError` where there are only pickle files, `CheckpointError` where there is nothing.
    """
    folder = Path(path)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        _explain_missing(folder, weights)
    return weights


def _explain_missing(folder: Path, weights: Path) -> NoReturn:
    with reading(weights):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        _refuse_pickle(folder / pickles[0], f"no {WEIGHTS_NAME}, only pickle files: {', '.join(pickles[:3])}")
    refuse(weights, None, "no such file", f"a folder with {WEIGHTS_NAME}", "check the path")


def check_size(weights: Path, limit: int | None) -> None:
    """Raise `CheckpointError` where the file has more than `limit` bytes."""
    with reading(weights):
        size = weights.stat().st_size
    if limit is not None and size > limit:
        do = "raise max_weights_bytes if you trust the file"
        refuse(weights, None, f"{size} bytes", f"at most {limit} bytes", do)


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """Every tensor of the file, copied: safetensors gives views of a memory map, which change with the file."""
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        _explain_unreadable(weights, error)


def _explain_unreadable(weights: Path, error: Exception) -> NoReturn:
    start = b""
    with suppress(OSError), weights.open("rb") as stream:
        start = stream.read(len(_GIT_LFS_START))
    if start.startswith(_PICKLE_STARTS):
        _refuse_pickle(weights, "a pickle under the name of a safetensors file")
    if start == _GIT_LFS_START:
        refuse(weights, None, "a pointer of git-lfs", "the weights it points to", "run git lfs pull", error)
    refuse(weights, None, f"a corrupt or truncated file ({shown(error)})", "safetensors", "get the file again", error)


def _refuse_pickle(file: Path, got: str) -> NoReturn:
    raise UnsafeCheckpointError(
        f"{file}: got {got}; wanted {WEIGHTS_NAME}: reading a pickle can run any code that is in it; ask its author "
        "for safetensors, or convert it where that cannot hurt: safetensors.torch.save_file(torch.load("
        f"{file.name!r}, weights_only=True), {WEIGHTS_NAME!r}, {{'format': 'pt'}})"
    )


def split_tensors(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module path -> {"theta": ..., "alpha": ...}, the other tensors by name), in the order of the file."""
    pairs: dict[str, dict[str, Tensor]] = {}
    other: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = PARAMETER.fullmatch(name)
        if match:
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            _check_not_stray(file, name)
            other[name] = tensor
    if not pairs:
        wanted = f"tensors {parameter_name('<module path>', 'theta')} and .road_alpha"
        refuse(file, None, "no RoAd parameters", wanted, "save the adapter with save_pretrained")
    for module, pair in pairs.items():
        _check_partners(file, module, pair)
    return pairs, other


def _check_not_stray(file: Path, name: str) -> None:
    if STRAY.fullmatch(name):
        got = "RoAd parameters under a name that PEFT does not write"
        wanted = f"{parameter_name('<module path>', 'theta')} or .road_alpha, without the adapter's name"
        refuse(file, name[:200], got, wanted, "save the adapter with save_pretrained")


def _check_partners(file: Path, module: str, pair: Mapping[str, Tensor]) -> None:
    for part, partner in (("theta", "alpha"), ("alpha", "theta")):
        if part not in pair:
            got = f"nothing, but a road_{partner}"
            refuse(file, parameter_name(module, part)[:200], got, "both tensors of the layer", "get the file again")


def check_finite(file: Path, layers: Mapping[str, LayerParameters]) -> None:
    """Raise `CheckpointError` where theta or alpha of a layer holds an infinity or a NaN."""
    tensors = _by_name(layers)
    if _are_finite(tensors.values()):
        return
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if not _are_finite([tensor]))
    got = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values not finite"
    do = "the training diverged or the file is damaged; use an earlier checkpoint"
    refuse(file, name, got, "finite values", do)


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Looked at together: an adapter has hundreds of tensors, all of them small."""
    together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        together.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return all(_is_finite(torch.cat(alike)) for alike in together.values())


def _is_finite(vector: Tensor) -> bool:
    if vector.dtype in _COMPARED and vector.numel():
        return all(math.isfinite(float(end)) for end in vector.aminmax())  # a NaN is both; 20 times as fast as isfinite
    return bool(torch.isfinite(vector).all())


def join_tensors(file: Path, adapter: Adapter) -> dict[str, Tensor]:
    """Everything that is to be in the file, by name: contiguous CPU tensors that share no memory."""
    for name in adapter.other:
        if STRAY.fullmatch(name) or name in _NOT_FOR_OTHERS:
            refuse(file, name[:200], "another tensor under a name that has a meaning", "another name", "rename it")
    return _without_aliases({**_by_name(adapter.layers), **adapter.other})


def _by_name(layers: Mapping[str, LayerParameters]) -> dict[str, Tensor]:
    return {
        parameter_name(module, part): tensor
        for module, layer in layers.items()
        for part, tensor in (("theta", layer.theta), ("alpha", layer.alpha))
    }


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can store, copied only where it has to be."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
