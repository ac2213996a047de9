"""One server for the tests that ask it things and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("tinker")
    from tests.train_service.tinker_server import serving

    state: Path = tmp_path_factory.mktemp("state")
    with serving(state) as found:
        yield found


@pytest.fixture(scope="module")
def service(server: Any) -> Iterator[Any]:
    """The SDK's client."""
    from tests.train_service.tinker_server import client

    with client(server) as found:
        yield found
