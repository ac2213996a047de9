"""Which adapters there are: a folder of them, those loaded from elsewhere, and a state file that survives a crash.

    adapters/                      the root: the folders in it with an adapter_config.json are adapters (`places`)
    ├── legal/ ...
    └── .roadie-serving.json       what was loaded from elsewhere, pinned, unloaded; replaced by a rename, after an fsync

A name that is not known is looked up in the root when a request asks for it, so that an adapter can be dropped in while the
server runs.

**Safe to be pointed at.** A path must lie in an allowed root, and so must what its links lead to. Where they lead to is found out
first, and then walked from that root, one directory at a time, without following any link, so that none can be put there
meanwhile; only regular files are read, at most so many bytes of each, into a private copy. That copy is what is parsed
(`roadie.checkpoint`, safetensors only), so that files that change, shrink or are swapped meanwhile do no harm.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from roadie import checkpoint
from roadie.adapter import Adapter
from roadie.bank.admission import ReadyAdapter
from roadie.checkpoint import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from roadie.checkpoint.replacement import replace_file
from roadie.errors import CheckpointError, ConfigError, StateNotWritten, UnknownAdapter
from roadie.serving.belongings import MAX_BYTES, TEMPLATE_NAME, TOKENIZER_CONFIG, Belongings, belongings_in
from roadie.serving.places import LeftOut, Places, check_served_name

STATE_NAME = ".roadie-serving.json"
STATE_FORMAT = 1
_NO_FILES = "memory:"
MAX_STATE_BYTES = 64 << 20
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


Stamp: TypeAlias = "tuple[tuple[int, int, int, int], ...]"
"""Device, inode, size and time of change (ns) of an adapter's two files: another one says that they are others."""


@dataclass(frozen=True)
class Entry:
    """What the state file says of one adapter. path: None for the folder of its name in the root; is_hidden: unloaded."""

    path: str | None = None
    is_pinned: bool = False
    is_hidden: bool = False


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter as it was read. content_hash: hex, of its parameters: equal for equal adapters; stamp: see `Registry.stamp`."""

    adapter: Adapter | ReadyAdapter
    content_hash: str
    path: str
    stamp: Stamp | None
    belongings: Belongings


class Registry:
    """The adapters of one server; see the module. Thread-safe.

    Open it with `Registry.open`. Raises `ConfigError` where the root is no folder, or the state is not one of a registry.
    """

    def __init__(
        self,
        root: Path,
        state_file: Path,
        allowed_roots: tuple[Path, ...],
        entries: Mapping[str, Entry],
        max_bytes: int,
    ) -> None:
        self.root, self.allowed_roots, self.max_adapter_bytes = root, allowed_roots, max_bytes
        self._places = Places(root, allowed_roots)
        self._state_file = state_file
        self._entries: Mapping[str, Entry] = MappingProxyType(dict(entries))
        self._lock = threading.Lock()
        self._vocabularies: dict[str, str | None] = {}
        self._looked: dict[Path, tuple[Stamp, Belongings]] = {}
        self._given: dict[str, ReadAdapter] = {}
        self._lent: list[Mapping[str, Path]] = []

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        *,
        state_file: str | os.PathLike[str] | None = None,
        allowed_roots: Iterable[str | os.PathLike[str]] = (),
        max_adapter_bytes: int = 1 << 30,
    ) -> Registry:
        """The registry of the folder `root`, as it was left.

        state_file: None: `STATE_NAME` in the root. allowed_roots: other folders that adapters may be loaded from.
        """
        folder = _resolved(root)
        state = Path(state_file) if state_file is not None else folder / STATE_NAME
        others = tuple(_resolved(other) for other in allowed_roots)
        return cls(folder, state, (folder, *others), _read_state(state), max_adapter_bytes)

    def lend(self, places: Mapping[str, Path]) -> None:
        """Adapters by name, in folders of the allowed roots; what the mapping has is looked at whenever it is asked for."""
        self._lent.append(places)

    def _lent_place(self, name: str) -> Path | None:
        return next((places[name] for places in self._lent if name in places), None)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the state says, by name."""
        return self._entries

    def names(self) -> tuple[str, ...]:
        """The adapters that a request may name, sorted: those of the state, whatever has become of them, and of the root."""
        known = {name for name, entry in self._entries.items() if not entry.is_hidden}
        there = {name for name in self._places.found()[0] if not self._entries.get(name, Entry()).is_hidden}
        lent = {
            name for places in self._lent for name in tuple(places) if not self._entries.get(name, Entry()).is_hidden
        }
        return tuple(sorted(known | there | lent | set(self._given)))

    def left_out(self) -> tuple[LeftOut, ...]:
        """The folders in the root that are no adapters, and why."""
        return self._places.found()[1]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or name in self._given:
            return isinstance(name, str)
        entry = self._entries.get(name)
        if entry is not None:
            return not entry.is_hidden
        return self._lent_place(name) is not None or self._places.has(name)

    def path_of(self, name: str) -> Path:
        """Where an adapter's files are, or were; of one without files a path that leads nowhere."""
        if name in self._given:
            return Path(self._given[name].path)
        entry = self._entries.get(name, Entry())
        return Path(entry.path) if entry.path is not None else self._lent_place(name) or self.root / name

    def read(self, name: str) -> ReadAdapter:
        """Read and check an adapter. Raises `UnknownAdapter`, and `CheckpointError` for files that cannot be used."""
        if name not in self:
            raise unknown_adapter(name)
        if name in self._given:
            return self._given[name]
        return self.read_folder(self.path_of(name))

    def stamp(self, path: Path) -> Stamp | None:
        """What the files of a folder are known by; None where there are none, and nothing for an adapter without files."""
        if str(path).startswith(_NO_FILES):
            return ()
        found = _stamp(path, (CONFIG_NAME, WEIGHTS_NAME))
        return found if len(found) == 2 else None

    def belongings(self, path: Path) -> Belongings:
        """What lies beside the weights in a folder, but for its tokenizer's vocabulary; looked at again where it has changed."""
        small = {CONFIG_NAME: MAX_CONFIG_BYTES, TEMPLATE_NAME: MAX_BYTES[TEMPLATE_NAME]}
        small[TOKENIZER_CONFIG] = MAX_BYTES[TOKENIZER_CONFIG]
        before, stamp = self._looked.get(path), _stamp(path, small)
        if before is not None and stamp in (before[0], ()):  # what is gone is what it was
            return before[1]
        found = Belongings()
        with (
            contextlib.suppress(CheckpointError, StateNotWritten),
            self._copied(path, self._real(path), small) as copies,
        ):
            base_model = checkpoint.read_config(copies).get("base_model_name_or_path")
            found = belongings_in(copies, base_model, {})
        if stamp:
            self._looked[path] = stamp, found
        return found

    def last_belongings(self, path: Path) -> Belongings:
        """What `belongings` said last; nothing is looked at."""
        return self._looked[path][1] if path in self._looked else Belongings()

    def allowed_path(self, path: str | os.PathLike[str]) -> Path:
        """An absolute path within the allowed roots; relative ones are within the root. Raises `CheckpointError` otherwise."""
        text = os.fspath(path)
        if "\0" in text or len(text) > 4096:
            raise CheckpointError(f"got path {text[:100]!r}; wanted a path to a folder")
        normal = Path(os.path.normpath(self.root / text))
        if self._root_of(normal) is None or ".." in Path(text).parts:
            raise CheckpointError(
                f"got path {text!r}, which is not within the folders that adapters may be loaded from; put it there"
            )
        return normal

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self.allowed_roots if path != root and path.is_relative_to(root)), None)

    def read_folder(self, path: Path) -> ReadAdapter:
        """Read and check the adapter in an allowed folder."""
        if self._root_of(path) is None:
            raise CheckpointError(
                f"got path {str(path)!r}; wanted one within the folders that adapters may be loaded from"
            )
        real = self._real(path)
        stamp = self.stamp(real)
        files = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: self.max_adapter_bytes, **MAX_BYTES}
        with self._copied(path, real, files) as copies:
            try:
                adapter = checkpoint.load(copies, max_weights_bytes=self.max_adapter_bytes)
            except CheckpointError as error:
                raise type(error)(str(error).replace(str(copies), str(path))) from None
            base_model = adapter.config.get("base_model_name_or_path")
            belongings = belongings_in(copies, base_model, self._vocabularies)
        return ReadAdapter(adapter, content_hash(adapter), str(path), stamp, belongings)

    @contextlib.contextmanager
    def _copied(self, path: Path, real: Path, files: Mapping[str, int]) -> Iterator[Path]:
        """A folder of private copies, of at most so many bytes each; of what lies beside the adapter only what can be had."""
        with tempfile.TemporaryDirectory(prefix="roadie-adapter-") as private:
            for name, limit in files.items():
                with contextlib.suppress(CheckpointError) if name in MAX_BYTES else contextlib.nullcontext():
                    self._copy_one(path / name, real / name, Path(private) / name, limit)
            yield Path(private)

    def _copy_one(self, path: Path, source: Path, copy: Path, limit: int) -> None:
        file = self._real(source)
        root = self._places.root_of(file)
        assert root is not None
        with _directory(root, file.parent.relative_to(root).parts) as folder:
            _copy(folder, file.name, copy, limit, path)

    def _real(self, path: Path) -> Path:
        real = self._places.real(path)
        if real is None:
            raise CheckpointError(
                f"{path}: got a symbolic link out of the folders that adapters may be loaded from; wanted a file or folder "
                "there; copy it, or allow where the link leads to"
            )
        return real

    def give(self, name: str, adapter: ReadyAdapter, content_hash: str) -> ReadAdapter:
        """An adapter without files, there until it is forgotten or the process ends, takes a name.

        Raises `ConfigError` for a name that is not allowed, or that an adapter with files has.
        """
        check_served_name(name)
        if name not in self._given and name in self:
            raise ConfigError(
                f"got {name!r}, which is an adapter with files; wanted a name of its own, or unload it first"
            )
        self._given[name] = ReadAdapter(adapter, content_hash, f"{_NO_FILES}{name}", (), Belongings())
        return self._given[name]

    def remember(self, name: str, entry: Entry) -> None:
        """Write down an adapter's entry; on an error (a full disk) nothing has changed. Raises `StateNotWritten`."""
        check_served_name(name)
        with self._lock:
            entries = {**self._entries, name: entry}
            if entry == Entry():
                del entries[name]
            if entries != self._entries:
                _write_state(self._state_file, entries)
                self._entries = MappingProxyType(entries)
            self._given.pop(name, None)

    def pin(self, name: str, is_pinned: bool) -> None:
        """Write down whether an adapter is pinned; raises `ConfigError` for one without files."""
        if name in self._given:
            raise ConfigError(f"got {name!r}, which has no files to be found by later; save it first, and load it")
        self.remember(name, replace(self._entries.get(name, Entry()), is_pinned=is_pinned))

    def forget(self, name: str) -> None:
        """An adapter was unloaded: requests do not find it until it is loaded again."""
        if self._given.pop(name, None) is not None:
            return
        is_found_again = self._lent_place(name) is not None or (self.root / name).is_dir()
        self.remember(name, Entry(is_hidden=True) if is_found_again else Entry())


def _stamp(folder: Path, names: Iterable[str]) -> Stamp:
    found = []
    for name in names:
        with contextlib.suppress(OSError):
            found.append(os.stat(folder / name))
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


def unknown_adapter(name: str) -> UnknownAdapter:
    """The error about a name that no adapter has."""
    return UnknownAdapter(
        f"got adapter {name[:200]!r}; wanted one of those in the folder of adapters, or one that was loaded; put it there or "
        "load it"
    )


def _resolved(folder: str | os.PathLike[str]) -> Path:
    try:
        path = Path(folder).resolve(strict=True)
    except OSError as error:
        raise ConfigError(
            f"got folder of adapters {os.fspath(folder)!r} ({error}); wanted a folder that exists"
        ) from None
    if not path.is_dir():
        raise ConfigError(f"got {os.fspath(folder)!r}, which is no folder; wanted a folder of adapters")
    return path


@contextlib.contextmanager
def _directory(root: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of the directory at ``root/parts``, reached without following a link below the root."""
    with contextlib.ExitStack() as stack:
        where, current = root, os.open(root, _DIRECTORY & ~getattr(os, "O_NOFOLLOW", 0))
        stack.callback(os.close, current)
        for part in parts:
            where = where / part
            try:
                current = os.open(part, _DIRECTORY, dir_fd=current)
            except OSError as error:
                raise _unreadable(where, error, "a folder") from None
            stack.callback(os.close, current)
        yield current


def _copy(folder: int, name: str, copy: Path, limit: int, shown: Path) -> None:
    """Copy a regular file of a directory, of at most `limit` bytes, and no more than it had when it was opened."""
    try:
        source = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        if copy.name == WEIGHTS_NAME:
            _note_what_is_there(folder, copy.parent)
        return  # checkpoint.load says what is missing
    except OSError as error:
        raise _unreadable(shown, error, "a regular file") from None
    with os.fdopen(source, "rb") as stream:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{shown}: got something that is not a regular file; wanted one; copy it there")
        if status.st_size > limit:
            raise CheckpointError(f"{shown}: got {status.st_size} bytes; wanted at most {limit}; raise the limit")
        try:
            with copy.open("wb") as target:
                _pour(stream, target, status.st_size)
        except OSError as error:
            raise StateNotWritten(
                f"{shown}: got {error.strerror} when a private copy was made in {copy.parent.parent}; nothing has changed; "
                "make room there"
            ) from None


def _pour(stream: Any, target: Any, num_bytes: int) -> None:
    while num_bytes > 0:
        piece = stream.read(min(num_bytes, 1 << 20))
        if not piece:
            return
        target.write(piece)
        num_bytes -= len(piece)


def _note_what_is_there(folder: int, private: Path) -> None:
    """Empty files of the same names as pickles, so that the error about the missing weights names them."""
    for name in os.listdir(folder):
        if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl"):
            (private / name).touch()


def _unreadable(path: Path, error: OSError, wanted: str) -> CheckpointError:
    got = "a symbolic link" if error.errno == errno.ELOOP else (error.strerror or type(error).__name__)
    return CheckpointError(f"{path}: got {got}; wanted {wanted}, not a link, that can be read; check the path")


def content_hash(adapter: Adapter) -> str:
    """SHA-256 over every layer's name, variant, group sizes and parameters, in hex; equal for equal adapters."""
    digest = hashlib.sha256()
    for path in sorted(adapter.layers):
        layer = adapter.layers[path]
        parts = (
            path,
            layer.variant.value,
            ", ".join(map(str, layer.stages)),
            str(layer.theta.dtype),
            str(layer.theta.numel()),
        )
        digest.update("\0".join(parts).encode())
        for tensor in (layer.theta, layer.alpha):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_state(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_STATE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file}: got {error.strerror}; wanted the state of a registry, or no such file") from None
    try:
        return _parsed_state(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file}: got something that is not the state of a registry ({error}); wanted what roadie wrote; move it away to "
            "start with the adapters of the folder"
        ) from None


def _parsed_state(state: Any) -> dict[str, Entry]:
    if state["format"] != STATE_FORMAT:
        raise ValueError(f"format {state['format']!r}, not {STATE_FORMAT}")
    entries = {str(name): Entry(**entry) for name, entry in state["adapters"].items()}
    for name, entry in entries.items():
        check_served_name(name)
        if not isinstance(entry.path, (str, type(None))) or not isinstance(entry.is_pinned, bool):
            raise TypeError(f"adapter {name!r}: {entry}")
    return entries


def _write_state(file: Path, entries: Mapping[str, Entry]) -> None:
    """The new state or the old one, never a part: written beside it, fsynced, renamed."""
    adapters = {name: vars(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"format": STATE_FORMAT, "adapters": adapters}, indent=2)
    try:
        replace_file(file, text)
    except OSError as error:
        raise StateNotWritten(
            f"{file}: got {error.strerror} when the registry's state was written; nothing has changed; make room"
        ) from None
