"""One server with keys for all tests of a module that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.serving.http.harness import Running
from tests.train_service.fine_tuning.harness import KEYS, serving
from tests.versions import NO_ENGINE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if NO_ENGINE:
        pytest.skip("the engine needs a newer transformers")
    with serving(tmp_path_factory.mktemp("service"), KEYS) as found:
        yield found
