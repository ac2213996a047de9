"""One deployment of two replicas for the tests that leave it as it is; adapters of the embedded model in a shared folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roadie import embedded


@pytest.fixture(scope="session")
def embedded_adapters() -> Path:
    return embedded.adapters_path()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, embedded_adapters: Path) -> Path:
    """A folder with `adapters`, in which three lie."""
    folder = tmp_path_factory.mktemp("deployed")
    shutil.copytree(embedded_adapters, folder / "adapters")
    return folder


@pytest.fixture(scope="module")
def cluster(shared: Path) -> Iterator[Any]:
    """Two replicas that run."""
    pytest.importorskip("ray", reason="needs Ray, which has an environment of its own: make test-ray")
    from tests.ray.cluster import deployed

    with deployed(shared, replicas=2, resources={"num_cpus": 1}) as running:
        yield running
