"""A tiny model on disk, and texts to train it on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import roadie

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "tiny.py")))


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions of tiny.py."""
    return TINY


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    return TINY.build(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 records that a model can learn something from."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    records = [{"prompt": f"{n:02d} is ", "completion": "a number of turtles"} for n in range(24)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> dict[str, Path]:
    """Two adapters of the tiny model with random parameters, strong enough to change what it writes."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(folder / name, tiny_path, seed) for seed, name in enumerate(("one", "two"))}


def random_adapter(folder: Path, base: Path, seed: int) -> Path:
    model = TINY.model()
    model.name_or_path = str(base)
    config = roadie.RoadConfig(task_type="CAUSAL_LM", target_modules="all-linear", group_size=16)
    adapted = roadie.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "road_theta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return folder
