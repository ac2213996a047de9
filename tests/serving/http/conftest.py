"""One server over a fake engine with keys, and one without, for all tests of a module that leave them as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.serving.http.harness import KEYS, Running, running


@pytest.fixture(scope="module")
def with_keys() -> Iterator[Running]:
    with running(keys=KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def open_server() -> Iterator[Running]:
    with running() as server:
        yield server
