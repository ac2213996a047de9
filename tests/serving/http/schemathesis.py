"""Schemathesis asks a server for what its document says, and for what it does not say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import HANG_S

_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance,ignored_auth"
)
_COMMAND = Path(sys.executable).parent / "schemathesis"
needs_schemathesis = pytest.mark.skipif(not _COMMAND.exists(), reason="schemathesis is not installed")


def check_document(url: str, key: str, folder: Path, phases: str, examples: int, *options: str) -> None:
    """Each case passes. folder: where it may write. options: of schemathesis."""
    done = subprocess.run(
        [
            *(_COMMAND, "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {key}", "--checks", _CHECKS),
            *("--phases", phases, "--max-examples", str(examples), "--seed", "1", "--warnings", "off"),
            *("--generation-database", "none", "--no-color", *options),
        ],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) == int(found[2]) > 50, done.stdout
