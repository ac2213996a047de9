"""Where adapters lie, by which names, and why a folder is none of them.

    adapters/
    ├── legal/               "legal"
    ├── v1.2/                "v1.2"
    ├── team/terse/          "team/terse"; up to `MAX_DEPTH` folders deep, and not within an adapter
    ├── law -> legal/        "law": a link is followed where what it leads to lies in an allowed folder
    ├── out -> /elsewhere/   left out
    └── .hidden/             passed over, as Kubernetes' "..data" is; links into it are not

Kubernetes' volumes and snapshots of the Hub's cache are made of such links. In a snapshot they lead to the "blobs" beside
"snapshots", which hold that one repository and are allowed with it.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roadie.checkpoint import CONFIG_NAME, read_config
from roadie.errors import ConfigError, RoadieError

MAX_NAME_CHARS = 128
MAX_DEPTH = 3
_SIGNS = frozenset("_-.@:+=~, ")
_BASE = "__base__"


@dataclass(frozen=True)
class LeftOut:
    """A folder that is no adapter, and why."""

    path: str
    reason: str


def name_problem(name: str) -> str | None:
    """Why an adapter of a server cannot have this name; None where it can.

    Letters, marks and digits of any script, and ``_ - . @ : + = ~ ,`` and spaces; parts between slashes begin with neither a dot
    nor a space. Whatever else a folder may be called would not survive a log, a page, or a pattern of a key.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or name == _BASE:
        return f"a name has 1 to {MAX_NAME_CHARS} characters, and is not {_BASE!r}"
    if any(not part or part[0] in ". " or part[-1] == " " for part in name.split("/")) or name[0] == "-":
        return "a name has no part that is empty, or begins with a dot or a space or ends with a space, and no hyphen in front"
    wrong = next(
        (sign for sign in name if sign not in _SIGNS and sign != "/" and unicodedata.category(sign)[0] not in "LMN"), ""
    )
    if wrong:
        return f"a name has letters, digits, spaces and _ - . @ : + = ~ , alone, not {wrong!a}"
    return None if unicodedata.is_normalized("NFC", name) else "a name has its letters composed (Unicode's NFC)"


def check_served_name(name: str) -> None:
    """Raise `ConfigError` for a name that an adapter of a server cannot have."""
    problem = name_problem(name)
    if problem is not None:
        raise ConfigError(f"got adapter name {ascii(name)[:200]}; {problem}; try 'my_adapter'")


class Places:
    """A folder of adapters, and others that they may come from; all resolved. See the module."""

    def __init__(self, root: Path, allowed: tuple[Path, ...]) -> None:
        self.root = root
        self._allowed = (*allowed, *(blobs for folder in allowed for blobs in _blobs_beside(folder)))

    def found(self) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
        """The adapters by name, and the folders that are none; nothing of them is opened."""
        names: dict[str, Path] = {}
        left_out: list[LeftOut] = []
        for path, problem in self._walk(self.root, self.root, 1):
            name = path.relative_to(self.root).as_posix()
            problem = problem or name_problem(name)
            if problem is None:
                names[name] = path
            else:
                left_out.append(LeftOut(shown(path), problem))
        return names, tuple(left_out)

    def has(self, name: str) -> bool:
        """Whether there is an adapter of this name; nothing of it is opened."""
        if name_problem(name) is not None:
            return False
        parts = name.split("/")
        folders = [self.root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
        if len(parts) > MAX_DEPTH or any(os.path.lexists(folder / CONFIG_NAME) for folder in folders[:-1]):
            return False
        real = self.real(folders[-1])
        return real is not None and self._config_problem(real) is None

    def real(self, path: Path) -> Path | None:
        """Where a path leads, without links; None where that is in none of the allowed folders."""
        real = Path(os.path.realpath(path))
        return real if self.root_of(real) is not None else None

    def root_of(self, real: Path) -> Path | None:
        """The allowed folder that a path without links lies in."""
        return next((root for root in self._allowed if real.is_relative_to(root)), None)

    def _walk(self, folder: Path, real: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
        """Folders that are adapters, and folders that are not, with the reason."""
        try:
            with os.scandir(real) as entries:
                inside = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
                )
        except OSError as error:
            yield folder, f"it cannot be read ({error.strerror})"
            return
        for entry in inside:
            path = folder / entry.name
            target = self.real(path) if entry.is_symlink() else real / entry.name
            if target is None:
                yield path, "it is a link out of the folders that adapters may be loaded from; allow where it leads to"
            elif not os.path.exists(path):
                yield path, "it is a link that leads nowhere"
            elif path.is_dir():
                yield from self._look(path, target, depth)

    def _look(self, path: Path, real: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
        if os.path.lexists(real / CONFIG_NAME):
            yield path, self._config_problem(real)
            return
        found = []
        if depth < MAX_DEPTH and not self.root.is_relative_to(real):  # a link up would find all of it again
            found = list(self._walk(path, real, depth + 1))
        yield from found
        if depth == 1 and not found:
            yield path, f"it has no {CONFIG_NAME}"

    def _config_problem(self, real: Path) -> str | None:
        config = real / CONFIG_NAME
        if self.real(config) is None:
            return f"its {CONFIG_NAME} is a link out of the folders that adapters may be loaded from; allow where it leads to"
        return None if config.is_file() else f"its {CONFIG_NAME} is no file"


def shown(path: Path) -> str:
    """A path as text, whatever bytes it is made of."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _blobs_beside(folder: Path) -> Iterator[Path]:
    """The blobs of a repository in the Hub's cache, for a folder within one of its snapshots."""
    for each in (folder, *folder.parents):
        if each.name == "snapshots" and (each.parent / "blobs").is_dir():
            yield each.parent / "blobs"


def recorded_bases(folder: Path) -> list[str]:
    """The base models that the adapters in a folder name; those that name none, or cannot be read, are left out."""
    found: list[str] = []
    root = folder.resolve()
    for path in Places(root, (root,)).found()[0].values():
        with contextlib.suppress(RoadieError):
            base = read_config(path).get("base_model_name_or_path")
            found += [base] if isinstance(base, str) else []
    return found
