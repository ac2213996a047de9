"""docs/with-lora.md: its Python is one program."""

from __future__ import annotations

from pathlib import Path

from tests.guides import blocks_of, run


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    blocks = blocks_of("with-lora.md")
    assert len(blocks) == 7
    run(blocks, tmp_path)
    assert (tmp_path / "zen" / "lora" / "adapter_model.safetensors").is_file()
