"""The official client against the server in a thread; tests/ray runs the same against replicas."""

from __future__ import annotations

from tests.serving.http.harness import USER_KEY, Running
from tests.serving.http.openai_client import Served, exercise


def test_the_official_client_gets_all_it_asks_for(with_keys: Running) -> None:
    exercise(Served(with_keys.url, USER_KEY, "base", ("legal", "terse")))
