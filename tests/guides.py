"""The Python of a guide is one program, which runs here, where nothing has to be imported first."""

from __future__ import annotations

import io
import os
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks_of(page: str, language: str = "python") -> list[str]:
    """The blocks of a language in a page of docs/, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run(blocks: list[str], folder: Path) -> str:
    """Run blocks of Python as one program in a folder; gives what it prints."""
    program, before = folder / "program.py", Path.cwd()
    program.write_text("\n".join(blocks), encoding="utf-8")
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(program), run_name="__main__")
    finally:
        os.chdir(before)
    return printed.getvalue()
