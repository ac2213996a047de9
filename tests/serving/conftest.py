"""A tiny model and adapters for it; transformers before 5.17 has no continuous batching that the engine knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.serving.harness import adapters_of, save_all
from tests.versions import NO_ENGINE

from roadie.adapter import Adapter
from roadie.testing import tiny_llama

collect_ignore_glob = ["test_engine*.py", "test_contract.py", "test_adapters.py"] if NO_ENGINE else []


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().eval()


@pytest.fixture(scope="module")
def adapters(model: Any) -> dict[str, Adapter]:
    return adapters_of(model, 8)


@pytest.fixture
def root(adapters: dict[str, Adapter], tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    save_all(adapters, folder)
    return folder
