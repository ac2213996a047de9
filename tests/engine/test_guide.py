"""The guide runs, and prints what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guides import blocks_of, run
from tests.versions import NO_ENGINE


@pytest.mark.skipif(NO_ENGINE, reason="the server's engine needs the continuous batching of newer transformers")
def test_the_guide_prints_what_it_says(tmp_path: Path) -> None:
    assert run(blocks_of("engine.md"), tmp_path) == "".join(blocks_of("engine.md", "text"))
    assert (tmp_path / "french" / "optimiser.safetensors").exists()
