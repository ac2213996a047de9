"""docs/with-lora.md: its Python is one program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.patience import HANG_S

PAGE = Path(__file__).resolve().parents[2] / "docs" / "with-lora.md"


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    program = tmp_path / "with_lora.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "zen" / "lora" / "adapter_model.safetensors").is_file()
