"""Adapters in a place that all machines reach: a folder, or whatever URI fsspec knows (s3://, gs://, hdfs://, memory://).

    adapters/
    ├── legal/                            what people put there, and change when they like
    └── .roadie/
        ├── catalogue.json                which version each name has; written by the directory
        └── versions/<sha256>/...         copies that never change: what replicas read

A version is known by the SHA-256 of its two files. It is copied before any replica hears of it, and whoever copies it on to
their own disk computes the hash again. So an adapter that is written to while it is read, or was damaged on its way, is an
error and never an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from roadie import checkpoint
from roadie.adapter import check_adapter_name
from roadie.checkpoint import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from roadie.checkpoint.replacement import replace_file
from roadie.errors import CheckpointError, ConfigError, RoadieError, StateNotWritten

OWN_FOLDER = ".roadie"
CATALOGUE = f"{OWN_FOLDER}/catalogue.json"
VERSIONS = f"{OWN_FOLDER}/versions"


def digest_of(config: bytes, weights: bytes) -> str:
    """SHA-256 of both files, hex; the length of the first keeps the border between them."""
    found = hashlib.sha256(len(config).to_bytes(8, "big"))
    found.update(config)
    found.update(weights)
    return found.hexdigest()


class SharedAdapters:
    """See the module. uri: absolute; allow_from: further places. Raises `ConfigError` where a place is not there."""

    def __init__(self, uri: str, allow_from: tuple[str, ...] = (), max_bytes: int = 1 << 30) -> None:
        self.uri, self.max_bytes = uri, max_bytes
        self._fs, self._root = opened(uri)
        self._roots = [(self._fs, self._root), *(opened(place) for place in allow_from)]

    def names(self) -> tuple[str, ...]:
        """The adapters that lie there, sorted."""
        found = (posixpath.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False))
        return tuple(sorted(name for name in found if self.has(name)))

    def has(self, name: str) -> bool:
        """Whether there is an adapter of this name; nothing of it is opened."""
        try:
            check_adapter_name(name)
        except RoadieError:
            return False
        place = f"{self._root}/{name}"
        return self._fs.isfile(f"{place}/{CONFIG_NAME}") and not (_is_local(self._fs) and os.path.islink(place))

    def place(self, source: str) -> str:
        """Where a source is, for people to read."""
        return source if "://" in source or source.startswith("/") else f"{self.uri.rstrip('/')}/{source}"

    def publish(self, source: str) -> str:
        """Make a copy of the adapter at a place that will not change, and return its digest.

        source: a path relative to the folder of adapters, or an absolute one within an allowed place. Raises `CheckpointError`
        for files that cannot be used or lie elsewhere, `StateNotWritten` where the copy cannot be written.
        """
        fs, place = self._allowed(source)
        config, weights = self._read_both(fs, place)
        self._check(config, weights, source)
        assert config is not None
        assert weights is not None
        digest = digest_of(config, weights)
        place = f"{self._root}/{VERSIONS}/{digest}"
        if not self._fs.isfile(f"{place}/{CONFIG_NAME}"):  # which is written last: where it is, all is
            self._put(f"{place}/{WEIGHTS_NAME}", weights)
            self._put(f"{place}/{CONFIG_NAME}", config)
        return digest

    def _allowed(self, source: str) -> tuple[Any, str]:
        if not source or "\0" in source or len(source) > 4096:
            raise CheckpointError(f"got path {source[:100]!r}; wanted a path to a folder")
        if "://" in source or source.startswith("/"):
            fs, path = fsspec.core.url_to_fs(source, use_listings_cache=False)
        else:
            fs, path = self._fs, f"{self._root}/{source}"
        normal = posixpath.normpath(path)
        root = next((root for other, root in self._roots if fs is other and normal.startswith(f"{root}/")), None)
        if root is None or ".." in source.split("/") or OWN_FOLDER in normal[len(root) :].split("/"):
            raise CheckpointError(
                f"got path {source!r}, which is not within the folders that adapters may be loaded from; put it there"
            )
        if _is_local(fs) and os.path.realpath(normal) != normal:
            raise CheckpointError(
                f"{source}: got a symbolic link; wanted a folder, not a link, that can be read; check the path"
            )
        return fs, normal

    def _read_both(self, fs: Any, place: str) -> tuple[bytes | None, bytes | None]:
        config = _read(fs, f"{place}/{CONFIG_NAME}", MAX_CONFIG_BYTES)
        return config, _read(fs, f"{place}/{WEIGHTS_NAME}", self.max_bytes)

    def _check(self, config: bytes | None, weights: bytes | None, shown: str) -> None:
        """What can be said without a model."""
        with tempfile.TemporaryDirectory(prefix="roadie-adapter-") as private:
            _write(Path(private), config, weights)
            try:
                checkpoint.load(private, max_weights_bytes=self.max_bytes)
            except CheckpointError as error:
                raise type(error)(str(error).replace(private, shown)) from None

    def _put(self, path: str, content: bytes) -> None:
        """A whole file, or none, which object stores do by themselves. Raises `StateNotWritten`; what was there stays then."""
        try:
            self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
            if _is_local(self._fs):
                replace_file(Path(path), content)
            else:
                self._fs.pipe_file(path, content)
        except OSError as error:
            raise StateNotWritten(
                f"{self.uri}: got {error.strerror or error} when {posixpath.basename(path)} was written; nothing has changed; "
                f"the place of the adapters must be writable for {OWN_FOLDER}, and have room"
            ) from None

    def fetch(self, digest: str, folder: Path) -> Path:
        """The version as a folder of this machine, `folder/digest`, whole or not at all. Raises `CheckpointError`."""
        target = folder / digest
        if target.is_dir():
            return target
        place = f"{self._root}/{VERSIONS}/{digest}"
        config, weights = self._read_both(self._fs, place)
        if config is None or weights is None or digest_of(config, weights) != digest:
            raise CheckpointError(
                f"{self.uri}: got other bytes than those of version {digest[:12]}; wanted what was published; load the "
                "adapter again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=folder))
        try:
            _write(scratch, config, weights)
            with contextlib.suppress(OSError):  # somebody else was faster, with the same bytes
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def read_catalogue(self) -> bytes | None:
        """What was written last; None where nothing was."""
        return _read(self._fs, f"{self._root}/{CATALOGUE}", 1 << 30)

    def write_catalogue(self, content: bytes) -> None:
        """Raises `StateNotWritten`; what was there stays then."""
        self._put(f"{self._root}/{CATALOGUE}", content)


def opened(uri: str) -> tuple[Any, str]:
    """The file system of a place, and its path there. Raises `ConfigError` where it cannot be reached or is no folder."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        path = os.path.realpath(path) if _is_local(fs) else path.rstrip("/")
        if fs.isdir(path):
            return fs, path
        reason = "no such folder"
    except (ImportError, ValueError, OSError) as error:
        reason = str(error)
    raise ConfigError(f"got folder of adapters {uri!r} ({reason}); wanted one that exists, which all machines reach")


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _read(fs: Any, path: str, limit: int) -> bytes | None:
    """At most `limit` bytes of a regular file; None where there is none."""
    try:
        if _is_local(fs) and (os.path.islink(path) or not os.path.isfile(path)):
            return None
        with fs.open(path, "rb") as stream:
            content: bytes = stream.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path}: got {error.strerror or error}; wanted a file that can be read; check it"
        ) from None
    if len(content) > limit:
        raise CheckpointError(f"{path}: got more than {limit} bytes; wanted at most that; raise the limit")
    return content


def _write(folder: Path, config: bytes | None, weights: bytes | None) -> None:
    for name, content in ((WEIGHTS_NAME, weights), (CONFIG_NAME, config)):
        if content is not None:
            (folder / name).write_bytes(content)
