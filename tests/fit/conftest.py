"""Checkpoints small enough to look at, on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, tensors, shards=1, config=None)``: a folder with a model of these tensors."""

    def written(name: str, tensors: Mapping[str, Tensor], shards: int = 1, config: Any = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if shards == 1:
            save_file(whole, folder / "model.safetensors")
        else:
            write_shards(folder, whole, shards)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return written


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    names = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(tensors)}
    for file in sorted(set(names.values())):
        save_file({key: tensors[key] for key, place in names.items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
