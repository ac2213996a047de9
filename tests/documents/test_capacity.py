"""docs/capacity.md: its Python is one program."""

from __future__ import annotations

from pathlib import Path

from tests.guides import blocks_of, run


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    blocks = blocks_of("capacity.md")
    assert len(blocks) == 4
    run(blocks, tmp_path)
