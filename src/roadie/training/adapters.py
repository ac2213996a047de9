"""Adapters by name: ``NAME=PATH`` as people write it, found, checked, and put on a model.

What may be a name: `roadie.adapter.check_adapter_name`. Only safetensors files are read. A pickle file
(``adapter_model.bin``) is refused unless `allow_pickle`; then torch reads it with ``weights_only=True``, which runs no
code, and its tensors are loaded by way of a safetensors copy in a temporary folder.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadie import checkpoint
from roadie.adapter import check_adapter_name
from roadie.errors import CheckpointError, ConfigError
from roadie.training.models import ModelSource, as_source, load_model, load_tokenizer
from roadie.training.places import check_adapter_place, check_model_place

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from roadie.tuner import PeftModel

PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter's name and the folder or hub repository it is in."""

    name: str
    path: str


def parse_adapters(texts: Sequence[str]) -> tuple[NamedAdapter, ...]:
    """``NAME=PATH`` or ``PATH`` (named after its last part), each; raises `ConfigError` for bad or double names."""
    adapters = tuple(_parse(text) for text in texts)
    names = [adapter.name for adapter in adapters]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"got two adapters named {double[0]!r}; wanted different names; write NAME=PATH")
    return adapters


def _parse(text: str) -> NamedAdapter:
    name, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        return NamedAdapter(_name_after(text), text)
    if not path:
        raise ConfigError(f"got adapter {text!r}; wanted NAME=PATH; add the path")
    check_adapter_name(name)
    return NamedAdapter(name, path)


def _name_after(path: str) -> str:
    """A valid name made of a path's last part."""
    last = Path(path).resolve().name if Path(path).exists() else path.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", last)[:100].lstrip("-")
    try:
        check_adapter_name(name)
    except ConfigError:
        return f"adapter_{name}"
    return name


@contextmanager
def adapter_folder(path: str, *, allow_pickle: bool = False) -> Iterator[Path]:
    """The local folder with a safetensors adapter that `path` stands for: a folder, a file in it, or a hub repository.

    Raises `CheckpointError` where there is none, `UnsafeCheckpointError` where there is only a pickle file.
    """
    folder = _local_folder(path, allow_pickle=allow_pickle)
    checkpoint.read_config(folder)
    if allow_pickle and not (folder / checkpoint.WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file():
        with _converted(folder) as copy:
            yield copy
    else:
        checkpoint.locate_weights(folder)
        yield folder


def _local_folder(path: str, *, allow_pickle: bool) -> Path:
    local = Path(path)
    if local.is_file():
        return local.parent
    if local.is_dir():
        return local
    check_adapter_place(path)
    return hub_folder(path, [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME, *([PICKLE_NAME] if allow_pickle else [])])


def hub_folder(name: str, files: list[str], revision: str | None = None) -> Path:
    """The local copy of a hub repository's `files` (names or patterns); raises `CheckpointError` where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: got neither a local folder nor a hub repository that could be read ({reason})"
        ) from error


@contextmanager
def _converted(folder: Path) -> Iterator[Path]:
    """A temporary copy of `folder` with its pickled tensors in a safetensors file."""
    from safetensors.torch import save_file

    tensors = _pickled_tensors(folder / PICKLE_NAME)
    with tempfile.TemporaryDirectory(prefix="roadie-") as name:
        copy = Path(name) / folder.resolve().name
        copy.mkdir()
        shutil.copyfile(folder / checkpoint.CONFIG_NAME, copy / checkpoint.CONFIG_NAME)
        save_file(tensors, copy / checkpoint.WEIGHTS_NAME, metadata={"format": "pt"})
        yield copy


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: got a pickle that holds more than tensors, or is broken ({error})") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path}: got something other than a mapping of names to tensors; wanted an adapter's weights"
        )
    return {str(name): tensor.contiguous().clone() for name, tensor in content.items()}


def base_model_of(folder: Path) -> str | None:
    """The base model that the adapter in `folder` names, None where it names none."""
    name = checkpoint.read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with adapters on it (a plain model where there are none), its tokenizer and where it came from."""

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    names: tuple[str, ...]


def load_adapted(adapters: Sequence[str | NamedAdapter], model: str | ModelSource | None = None) -> AdaptedModel:
    """The base model, in the dtype it is stored in and on the CPU, with `adapters` attached; in evaluation mode.

    Raises `RoadieError` where an adapter cannot be found or read, does not fit, or names another base model.
    """
    named = _named(adapters)
    asked = as_source(model)
    check_model_place(asked.place)
    with ExitStack() as stack:
        folders = {a.name: stack.enter_context(adapter_folder(a.path, allow_pickle=asked.allow_pickle)) for a in named}
        source = asked.for_adapters(base_model_of(folder) for folder in folders.values())
        adapted = attach(load_model(source), folders)
    return AdaptedModel(adapted, load_tokenizer(source), source, tuple(folders))


def _named(adapters: Sequence[str | NamedAdapter]) -> tuple[NamedAdapter, ...]:
    if isinstance(adapters, str):
        raise ConfigError(f"got adapters={adapters!r}; wanted a list; put it into brackets")
    return parse_adapters([a if isinstance(a, str) else f"{a.name}={a.path}" for a in adapters])


def attach(model: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel | PreTrainedModel:
    """The PEFT model with the adapters of these folders, by name: none trainable, the first active; `model` if none.

    Raises what `roadie.PeftModel.from_pretrained` raises for an adapter that does not fit.
    """
    from roadie.tuner import PeftModel

    if not folders:
        return model
    (first, folder), *others = folders.items()
    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, folder in others:
        adapted.load_adapter(str(folder), adapter_name=name)
    return adapted.eval()
