"""The OpenAPI document is true: schemathesis asks what it says, and what it does not; thousands of cases are a benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import HANG_S
from tests.serving.http.harness import ADMIN_KEY, KEYS, Running, running

from roadie.serving.http.gate import ROUTES, Right

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance,ignored_auth"
)
SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"


def test_every_route_is_described_and_guarded_as_it_says(with_keys: Running, open_server: Running) -> None:
    document = with_keys.http().get("/openapi.json").json()
    hidden = {"/", "/page.js", "/page.css", "/icon.svg", "/openapi.json"}
    assert set(document["paths"]) == set(ROUTES) - hidden
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (ROUTES[path].right is not Right.NONE)
            assert "422" not in operation["responses"]
    assert "security" not in open_server.http().get("/openapi.json").text


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed")
def test_a_few_dozen_cases_of_schemathesis(tmp_path: Path) -> None:
    with running(keys=KEYS) as server:
        done = subprocess.run(
            [
                *(SCHEMATHESIS, "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {ADMIN_KEY}"),
                *("--checks", CHECKS, "--phases", "fuzzing", "--max-examples", "6", "--seed", "1", "--warnings", "off"),
                *("--generation-database", "none", "--no-color"),
            ],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=HANG_S,
        )
    assert done.returncode == 0, done.stdout
    generated, passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups()
    assert int(generated) == int(passed) > 50
