"""docs/mathematics.md is one program, and its assertions hold."""

from __future__ import annotations

from pathlib import Path

from tests.guides import blocks_of, run


def test_the_code_of_the_mathematics_runs(tmp_path: Path) -> None:
    blocks = blocks_of("mathematics.md")
    assert len(blocks) > 5
    run(blocks, tmp_path)
