"""The Python of a guide is one program, which runs here, where nothing has to be imported first."""

from __future__ import annotations

import io
import os
import re
import runpy
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
FENCE = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = "not run: "


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its lines, and the reason of the comment before it, "not run: ...", if it is not run."""

    language: str
    code: str
    not_run: str | None


def all_blocks(text: str) -> list[Block]:
    """All blocks of a document, in order."""
    return [
        Block(language, code, said.removeprefix(NOT_RUN) if said.startswith(NOT_RUN) else None)
        for said, language, code in FENCE.findall(text)
    ]


def blocks_of(page: str, language: str = "python") -> list[str]:
    """The blocks of a language in a page of docs/ that are not marked as not run, in order."""
    blocks = all_blocks((DOCS / page).read_text(encoding="utf-8"))
    return [block.code for block in blocks if block.language == language and block.not_run is None]


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
