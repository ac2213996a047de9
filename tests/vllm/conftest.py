"""vLLM on a CPU: little memory, no network, processes that are started anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # tests run functions of their own in the workers
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the random Llama."""
    from tests.vllm import cases

    return cases.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of every kind, by name."""
    from tests.vllm import cases

    return cases.write_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def requests() -> Any:
    from tests.vllm import cases

    return cases.Requests()


@pytest.fixture(scope="session")
def llm(base: Path) -> Iterator[Any]:
    """An engine with 1,000 slots, as its users would run it: engine and worker in processes of their own."""
    from tests.vllm import cases

    with cases.engine(base, 1000, max_num_seqs=256) as running:
        yield running
