"""The OpenAPI document is true: schemathesis asks what it says, and what it does not; thousands of cases are a benchmark."""

from __future__ import annotations

from pathlib import Path

from tests.serving.http.harness import ADMIN_KEY, KEYS, Running, running
from tests.serving.http.schemathesis import check_document, needs_schemathesis

from roadie.serving.http.gate import ROUTES, Right


def test_every_route_is_described_and_guarded_as_it_says(with_keys: Running, open_server: Running) -> None:
    document = with_keys.http().get("/openapi.json").json()
    hidden = {"/", "/page.js", "/page.css", "/icon.svg", "/openapi.json"}
    assert set(document["paths"]) == set(ROUTES) - hidden
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (ROUTES[path].right is not Right.NONE)
            assert "422" not in operation["responses"]
    assert "security" not in open_server.http().get("/openapi.json").text


@needs_schemathesis
def test_a_few_dozen_cases_of_schemathesis(tmp_path: Path) -> None:
    with running(keys=KEYS) as server:
        check_document(server.url, ADMIN_KEY, tmp_path, "fuzzing", 6)
