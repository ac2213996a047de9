"""What has been done so far, a line of JSON each, on the disk before anything else begins: a killed run keeps what it had.

    {"what": "run", ...}                                                       once, at the start
    {"what": "began", "step": "layers", "by": "layers/0", "case": "..."}
    {"what": "ended", "step": "layers", "by": "layers/0", "case": "...", "entries": [...]}     or "error" instead
    {"what": "stopped", "step": "layers", "by": "layers/0", "case": "..."}     where the time of its step was over

Several processes write to one file: a line is one write at its end. "by" is the part of a step that one process does at a time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]
RUN, BEGAN, ENDED, STOPPED = "run", "began", "ended", "stopped"
DIED = "the process did not live to the end of it: a crash, or no answer for too long; log.txt has its last words"


class Journal:
    """The lines of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"

    def put(self, what: str, **content: Any) -> None:
        """Add a line; it is on the disk when this returns."""
        # The line's end comes first, so that nothing is lost behind a line that was cut off.
        line = "\n" + json.dumps({"what": what, **content}, ensure_ascii=False, default=str)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def lines(self, *what: str) -> list[Line]:
        """All lines of some kinds, in their order; one that was being written when the machine stopped is passed over."""
        if not self.path.exists():
            return []
        found = (_parsed(text) for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines())
        return [line for line in found if line is not None and line["what"] in what]

    def seen(self, step: str) -> set[str]:
        """The cases of a step that are not to be begun again: those that ended, whatever came of them."""
        return {line["case"] for line in self.lines(ENDED) if line["step"] == step}

    def unended(self) -> list[Line]:
        """The lines of cases that began and did not end."""
        ended = {(line["step"], line["case"]) for line in self.lines(ENDED, STOPPED)}
        return [line for line in self.lines(BEGAN) if (line["step"], line["case"]) not in ended]

    def bury(self, by: str) -> None:
        """Write down as failures what an earlier process of a part left unended."""
        for line in self.unended():
            if line["by"] == by:
                self.put(ENDED, step=line["step"], by=by, case=line["case"], error=DIED)


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "what" in line else None
