"""Docstrings of the standard library as labelled text: which package one comes from, and which body a summary belongs to.

All docstrings of a module are in one split, chosen by a hash of the module's path; a text that occurs twice anywhere is
left out, so that no text is in two splits.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from roadie.embedded import corpus

MINIMUM_TEXT = 20
MINIMUM_CLASS = 30
MINIMUM_BODY = 40
TOP_LEVEL = "."
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SHARES = {TEST: 0.2, VALIDATION: 0.2}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Docstring:
    """package: the first folder of the module's path, TOP_LEVEL where there is none; body: what follows the summary."""

    package: str
    module: str
    summary: str
    body: str

    @property
    def text(self) -> str:
        """Summary and body."""
        return f"{self.summary} {self.body}".strip()


@lru_cache(maxsize=2)
def docstrings(root: Path | None = None) -> tuple[Docstring, ...]:
    """Docstrings of the standard library, in the order of the files; texts that repeat left out."""
    root = root or corpus.standard_library()
    found = [docstring for path in sorted(root.rglob("*.py")) for docstring in _of_file(path, root)]
    counts = Counter(docstring.text for docstring in found)
    return tuple(docstring for docstring in found if counts[docstring.text] == 1)


def packages(found: Sequence[Docstring]) -> tuple[str, ...]:
    """Packages with enough docstrings in enough modules to have all three splits, sorted."""
    names = {docstring.package for docstring in found} - {TOP_LEVEL}
    split = {name: by_split([d for d in found if d.package == name]) for name in names}
    enough = [
        package
        for package, parts in split.items()
        if all(len(parts[name]) >= 4 for name in (TRAIN, VALIDATION, TEST))
        and sum(map(len, parts.values())) >= MINIMUM_CLASS
    ]
    return tuple(sorted(enough))


def by_split(found: Sequence[Docstring]) -> dict[str, list[Docstring]]:
    """The docstrings of one package by split: modules in the order of a hash fill TEST, then VALIDATION, then TRAIN."""
    modules: dict[str, list[Docstring]] = defaultdict(list)
    for docstring in found:
        modules[docstring.module].append(docstring)
    waiting = sorted(modules, key=lambda module: hashlib.sha256(module.encode()).digest())
    parts: dict[str, list[Docstring]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for name, share in SHARES.items():
        room = share * len(found)
        for module in list(waiting):
            if len(modules[module]) <= room or (not parts[name] and len(modules[module]) <= 2 * room):
                parts[name] += modules[module]
                room -= len(modules[module])
                waiting.remove(module)
    parts[TRAIN] = [docstring for module in waiting for docstring in modules[module]]
    return parts


def with_body(found: Sequence[Docstring]) -> list[Docstring]:
    """The docstrings whose summary is followed by enough text, no body twice."""
    bodies = Counter(docstring.body for docstring in found)
    return [one for one in found if len(one.body) >= MINIMUM_BODY and bodies[one.body] == 1]


def _of_file(path: Path, root: Path) -> Iterator[Docstring]:
    relative = path.relative_to(root)
    if corpus.NEVER_READ.intersection(relative.parts) or relative.name.startswith(corpus.WRITTEN_BY_THE_BUILD):
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    package = relative.parts[0] if len(relative.parts) > 1 else TOP_LEVEL
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and len(text) >= MINIMUM_TEXT:
            summary, _, body = text.partition("\n\n")
            yield Docstring(package, relative.as_posix(), " ".join(summary.split()), " ".join(body.split()))
