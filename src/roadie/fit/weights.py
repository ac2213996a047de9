"""The tensors of a whole model on the disk, read one at a time and never more: safetensors, in one file or in shards.

    folder/model.safetensors                                   one file
    folder/model.safetensors.index.json                        {"weight_map": {tensor name: file name}}, and its shards
    folder/config.json                                         optional: model_type, vocab_size, architectures

Tensors are views of memory-mapped files: a model larger than the memory can be read, as the system takes the pages back.
Pickle files are never opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from roadie import checkpoint
from roadie.checkpoint.refusal import reading, refuse, shown
from roadie.errors import UnsafeCheckpointError

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODEL_CONFIG_NAME = "config.json"

FLOATS = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"})
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and its shape and dtype (in safetensors' words: "F32", "BF16"); its values are not read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """The tensor, on the CPU, as a view of the file; raises `CheckpointError` where it cannot be read."""
        try:
            with safe_open(self.file, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(self.name)
                return tensor
        except (SafetensorError, OSError, RuntimeError) as error:
            _refuse_file(self.file, error)


@dataclass(frozen=True)
class Weights:
    """All tensors of a model by name, in the order of the files, and its config (empty where there is none)."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]


def find_weights(path: str | os.PathLike[str]) -> Weights:
    """The tensors of the model in the folder `path` (or in that safetensors file); reads headers only.

    Raises `CheckpointError` where files are missing, broken or do not hold what the index says, and
    `UnsafeCheckpointError` where there are only pickle files.
    """
    place = Path(path)
    if place.is_file():
        return Weights(place.parent, tensors_in_file(place), _config(place.parent))
    if (place / INDEX_NAME).is_file():
        return Weights(place, _in_shards(place), _config(place))
    if not (place / WHOLE_NAME).is_file():
        _explain_missing(place)
    return Weights(place, tensors_in_file(place / WHOLE_NAME), _config(place))


def tensors_in_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; raises `CheckpointError` where it is missing or broken."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: StoredTensor(name, file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, RuntimeError) as error:
        _refuse_file(file, error)


def _in_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_NAME
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        refuse(index, "weight_map", "no mapping of names to files", "tensor name -> file name", "get the file again")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            refuse(index, name[:200], "a path, or no safetensors", "the name of a file beside the index", "check it")
        found |= {key: stored for key, stored in tensors_in_file(folder / name).items() if places.get(key) == name}
    missing = sorted(set(places) - set(found))
    if missing:
        got = f"{len(missing)} tensors that are not in the file it names"
        refuse(index, missing[0][:200], got, "complete shards", "get the files again")
    return found


def _config(folder: Path) -> dict[str, Any]:
    file = folder / MODEL_CONFIG_NAME
    return json_object(file) if file.is_file() else {}


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` where there is none."""
    try:
        with reading(file):
            content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        refuse(file, None, f"text that is not JSON ({shown(error)})", "a JSON object", "get the file again", error)
    if not isinstance(content, dict):
        refuse(file, None, f"a JSON {type(content).__name__}", "a JSON object", "get the file again")
    return content


def _explain_missing(folder: Path) -> NoReturn:
    wanted = f"a folder with {WHOLE_NAME} or {INDEX_NAME}"
    if not folder.is_dir():
        refuse(folder, None, "no such folder", wanted, "check the path")
    if (folder / checkpoint.CONFIG_NAME).is_file():
        refuse(folder, None, "an adapter", f"{wanted}, a whole model", "fit a LoRA adapter with from_lora")
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UnsafeCheckpointError(
            f"{folder}: got {', '.join(pickles[:3])}; wanted {WHOLE_NAME}: reading a pickle can run any code that is in it; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    refuse(folder, None, "neither", wanted, "check the path")


def _refuse_file(file: Path, error: Exception) -> NoReturn:
    if not file.is_file():
        refuse(file, None, "no such file", "all shards that the index names", "get the files again", error)
    refuse(file, None, f"a corrupt or truncated file ({shown(error)})", "safetensors", "get the file again", error)
