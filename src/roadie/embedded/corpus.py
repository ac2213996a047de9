"""Real text that is on every machine: the Python standard library, cut into a pretraining part and held-out kinds.

    standard library ──┬── pretraining    what the embedded model was trained on
                       └── kinds          what it never saw: a few manners of writing to adapt it to
                             ├── train      files an adapter may learn from
                             └── held_out   other files, to measure it on

The rules, all of them deterministic:

- A document is one ``.py`` file below the interpreter's standard library directory, or one topic of
  ``pydoc_data/topics.py`` as plain text. Installed packages, test suites and files written by the build of this
  interpreter are never read.
- Whatever belongs to a kind in ``KINDS``, whether that kind is used or not, is kept out of pretraining.
- A kind is split by document: up to a fifth of its characters and half of its documents are held out, chosen by a hash
  of their names.
- No paragraph of ``MINIMUM_PARAGRAPH`` characters or more stands on both sides of a split, nor in pretraining and in a
  kind: it is removed from the side that is learnt from. (The topics quote each other at length.)
- Slim installs lack some packages: ``kinds()`` walks down ``KINDS`` in order and skips what is missing or too small.

Pure standard library; nothing heavy is imported.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

PRETRAINING = "pretraining"

KINDS: dict[str, tuple[str, ...]] = {
    "topics": ("pydoc_data",),
    "asyncio": ("asyncio",),
    "turtle": ("turtle.py", "turtledemo", "tkinter"),
    "unittest": ("unittest", "doctest.py"),
    "encodings": ("encodings",),
    "idlelib": ("idlelib",),
}
"""Kinds in order of preference, each with the files and directories of the standard library that it owns."""

NEVER_READ = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "ensurepip", "lib-dynload"}
)
WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "_sysconfig_vars")

HELD_OUT_SHARE = 0.2
MINIMUM_KIND = 60_000
"""Characters below which a kind counts as not installed."""
MINIMUM_PARAGRAPH = 80
"""Characters (white space squeezed) from which on a paragraph may not be on both sides of a split."""

_UNDERLINE = re.compile(r"[*=~^\"+#-]{3,}")
_BLANK_LINES = re.compile(r"(\n[ \t]*\n+)")


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path below the standard library, `kind` a name in `KINDS` or `PRETRAINING`."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Split:
    """The documents of one kind, cut by document into those to learn from and those to measure on."""

    kind: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def standard_library() -> Path:
    """The directory that holds the standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def pretraining(root: Path | None = None) -> tuple[Document, ...]:
    """All of the standard library at `root` (default: this interpreter's) that belongs to no kind, sorted by name."""
    root = root or standard_library()
    owned = {name for names in KINDS.values() for name in names}
    documents = [
        Document(path.relative_to(root).as_posix(), PRETRAINING, text)
        for path, text in _files(root, [entry for entry in _entries(root) if entry.name not in owned])
    ]
    kept_apart = _paragraphs(document for kind in KINDS for document in _of_kind(kind, root))
    return _without(documents, kept_apart)


def kinds(root: Path | None = None, count: int = 3) -> tuple[str, ...]:
    """The first `count` names of `KINDS` whose files are installed; LookupError where there are fewer."""
    root = root or standard_library()
    found = [kind for kind in KINDS if _is_usable(kind, root)][:count]
    if len(found) < count:
        raise LookupError(
            f"the standard library at {root} has text for {len(found)} kinds {found}, wanted {count} of {list(KINDS)}; "
            "use a Python installed with its .py files (on Debian and Ubuntu: apt install libpython3-stdlib)"
        )
    return tuple(found)


@lru_cache(maxsize=16)
def split(kind: str, root: Path | None = None) -> Split:
    """The documents of `kind`, cut into `train` and `held_out`; LookupError for a kind that is unknown or not installed."""
    root = root or standard_library()
    if kind not in KINDS:
        raise LookupError(f"got the kind {kind!r}, wanted one of {list(KINDS)}")
    if not _is_usable(kind, root):
        raise LookupError(f"the text of the kind {kind!r} is not installed in {root}; kinds() names those that are")
    return cut(kind, _of_kind(kind, root))


def cut(kind: str, documents: Sequence[Document]) -> Split:
    """`documents` cut in two by the rules above; cutting `train` again gives a validation part."""
    held_out = _chosen(documents, HELD_OUT_SHARE)
    train = [document for document in documents if document not in held_out]
    return Split(kind, _without(train, _paragraphs(held_out)), held_out)


def _is_usable(kind: str, root: Path) -> bool:
    documents = _of_kind(kind, root)
    return len(documents) > 1 and sum(len(document.text) for document in documents) >= MINIMUM_KIND


@lru_cache(maxsize=64)
def _of_kind(kind: str, root: Path) -> tuple[Document, ...]:
    files = _files(root, [root / name for name in KINDS[kind]])
    if kind == "topics":
        return tuple(document for path, text in files if path.name == "topics.py" for document in _topics(text))
    return tuple(Document(path.relative_to(root).as_posix(), kind, text) for path, text in files)


def _entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _files(root: Path, entries: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Path and text of every Python file at or below `entries`, in the order of the names."""
    for entry in entries:
        if entry.name in NEVER_READ or entry.name.startswith(WRITTEN_BY_THE_BUILD):
            continue
        if entry.is_dir():
            yield from _files(root, _entries(entry))
        elif entry.suffix == ".py" and entry.is_file() and (text := _read(entry)):
            yield entry, text


def _read(path: Path) -> str:
    """The text of a file with its line ends as newlines, empty where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return ""


def _topics(source: str) -> Iterator[Document]:
    """The topics of pydoc's `help()`, which `topics.py` holds as one dictionary, as documents of plain text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield Document(f"pydoc_data/topics.py:{name}", "topics", _plain(text))


def _plain(text: str) -> str:
    """Prose without the lines that underline headings and without the marks of emphasis."""
    lines = [line.rstrip() for line in text.splitlines() if not _UNDERLINE.fullmatch(line.strip())]
    return "\n".join(lines).replace("**", "").strip()


def _chosen(documents: Iterable[Document], share: float) -> tuple[Document, ...]:
    """At most half of the documents and `share` of their characters, but at least one document, in the order of a hash."""
    by_hash = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    room = share * sum(len(document.text) for document in by_hash)
    chosen: list[Document] = []
    for document in by_hash:
        if len(document.text) <= room and len(chosen) < len(by_hash) // 2:
            chosen.append(document)
            room -= len(document.text)
    return tuple(chosen or [min(by_hash, key=lambda document: len(document.text))])


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _paragraphs(documents: Iterable[Document]) -> frozenset[str]:
    """The long paragraphs of `documents`, white space squeezed."""
    squeezed = (_squeezed(part) for document in documents for part in _BLANK_LINES.split(document.text))
    return frozenset(part for part in squeezed if len(part) >= MINIMUM_PARAGRAPH)


def _without(documents: Iterable[Document], paragraphs: frozenset[str]) -> tuple[Document, ...]:
    """`documents` less the given `paragraphs`; a document of which nothing is left is dropped."""
    kept = []
    for document in documents:
        parts = _BLANK_LINES.split(document.text)
        text = "".join(part for part in parts if _squeezed(part) not in paragraphs).strip()
        kept.append(document if text == document.text else replace(document, text=text))
    return tuple(document for document in kept if document.text)
