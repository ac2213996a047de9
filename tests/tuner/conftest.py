"""What the tests of the tuner share: one thread, PEFT routed to roadie, and ways to look at a model from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roadie
from roadie.testing import tiny_llama

BASE = "__base__"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    roadie.register()
    yield
    roadie.register()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk, with predictions far from uniform, so that small differences change the text."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture
def row_by_row() -> Callable[..., Tensor]:
    """What a mixed batch must give: each row from a run of the whole batch through that row's adapter alone."""

    def run(model: Any, rows: Sequence[str], call: Callable[[], Tensor], copies: int = 1) -> Tensor:
        alone = {name: _with_one(model, name, call) for name in dict.fromkeys(rows)}
        return torch.cat([alone[name][index * copies : (index + 1) * copies] for index, name in enumerate(rows)])

    return run


def _with_one(model: Any, name: str, call: Callable[[], Tensor]) -> Tensor:
    if name == BASE:
        with model.disable_adapter():
            return call()
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(active)


@pytest.fixture
def portrait() -> Callable[[nn.Module], dict[str, Any]]:
    """Everything of a model that a refused operation must leave alone; two portraits are equal or something changed."""
    return take_portrait


def take_portrait(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", {})
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "identity": [(name, id(module)) for name, module in model.named_modules()],
        "bits": {name: _bits(tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "training": [(name, module.training) for name, module in model.named_modules()],
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "books": [
            (name, repr({key: getattr(module, key) for key in _BOOKS if hasattr(module, key)}))
            for name, module in model.named_modules()
        ],
        "attributes": sorted(model.__dict__),
    }


_BOOKS = ("_active_adapter", "_disable_adapters", "merged_adapters", "active_adapter", "variant", "group_size")


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], str]:
    plain = tensor.detach().contiguous().cpu()
    if plain.is_floating_point():
        plain = plain.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(plain.numpy().tobytes()).hexdigest()
