"""Adapters merged into their base model, as a whole model on disk that needs neither roadie nor PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roadie.errors import ConfigError
from roadie.training.adapters import NamedAdapter, load_adapted
from roadie.training.folders import check_free, whole_folder
from roadie.training.models import ModelSource


@dataclass(frozen=True)
class MergeResult:
    """What was written: the base model's name, the adapters in the order they were applied, the files and their bytes."""

    output: Path
    model: str
    adapters: tuple[str, ...]
    dtype: str
    files: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def merge_to_disk(
    adapters: Sequence[str | NamedAdapter],
    output: str | Path,
    *,
    model: str | ModelSource | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> MergeResult:
    """Write the base model with `adapters` merged in, in the order given, to the folder `output`.

    The folder holds what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load: config,
    generation config, tokenizer, and safetensors of at most `max_shard_size` each ("200MB", "5GB"), in the dtype the
    base model is stored in. It appears whole or not at all.
    model: None takes the base model that the adapters name.
    Raises `RoadieError` where the output exists, an adapter does not fit, or the merged weights are not finite.
    """
    output = Path(output)
    _check_shard_size(max_shard_size)
    check_free(output, overwrite=overwrite)
    if not adapters:
        raise ConfigError("got no adapter; wanted at least one to merge")
    adapted = load_adapted(adapters, model)
    whole = adapted.model.merge_and_unload(safe_merge=True, adapter_names=list(adapted.names))
    with whole_folder(output, overwrite=overwrite) as folder:
        whole.save_pretrained(str(folder), max_shard_size=max_shard_size)
        adapted.tokenizer.save_pretrained(str(folder))
    files = tuple((path.name, path.stat().st_size) for path in sorted(output.iterdir()))
    return MergeResult(output, adapted.source.place, adapted.names, str(whole.dtype).removeprefix("torch."), files)


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?([KMGT]i?)?B", size):
        raise ConfigError(f"got max_shard_size={size!r}; wanted a number and a unit; try '5GB' or '200MB'")
