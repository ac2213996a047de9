"""docs/tutorials/trl.md is one program, in which the held-out loss falls, and what it saves is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.guides import blocks_of, run


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    printed = run(blocks_of("tutorials/trl.md"), tmp_path)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < 0.7 * before
    assert (tmp_path / "sums" / "adapter_config.json").is_file()
