"""A tiny model and adapters for it; transformers before 5.23 has no continuous batching that the engine knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.serving.harness import adapters_of, save_all
from tests.versions import OLD_TRANSFORMERS

from roadie.adapter import Adapter
from roadie.testing import tiny_llama

collect_ignore_glob = ["test_engine*.py", "test_contract.py", "test_adapters.py"] if OLD_TRANSFORMERS else []


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
