"""Copies of adapters under the hash of their content: what workers read, and what the prefix cache knows adapters by.

Whatever happens to the files that a user named, a copy stays as it was checked. Two adapters of one content are one copy;
an adapter that has changed is another copy, so that no key-value cache of the old one is used for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from roadie import checkpoint
from roadie.adapter import Adapter

_PREFIX = "roadie-vllm-"
_LOCK = "in-use"
_REASON = "refused.txt"


class AdapterStore:
    """A folder of checked adapters, ``<hash>/adapter_config.json`` and ``<hash>/adapter_model.safetensors``.

    folder: one that stays and may be shared; None: a temporary one, removed when this object or the process ends. What
    processes that were killed left behind is removed when another store is made.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.is_temporary = folder is None
        if folder is not None:
            self.folder = Path(folder).absolute()
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._finalizer = weakref.finalize(self, _remove, self.folder, lock)

    def add(self, path: str | os.PathLike[str]) -> Path:
        """The copy of the adapter in the folder `path`.

        Raises `CheckpointError` where it is not a sound RoAd adapter.
        """
        return self.keep(checkpoint.load(path))

    def keep(self, adapter: Adapter) -> Path:
        """The copy of an adapter."""
        copy = self.folder / content_hash(adapter)
        if not (copy / checkpoint.CONFIG_NAME).is_file():
            checkpoint.save(adapter, copy)
        return copy

    def remove(self, copy: Path) -> None:
        """Take a copy out of a temporary store; a folder that the user named keeps what is in it."""
        if self.is_temporary:
            shutil.rmtree(copy, ignore_errors=True)


def content_hash(adapter: Adapter) -> str:
    """SHA-256 of the config and all tensors, as 32 hexadecimal digits: equal for equal content, wherever the files are."""
    digest = hashlib.sha256(checkpoint.config_text(adapter.config).encode())
    for path, layer in sorted(adapter.layers.items()):
        for tensor in (layer.theta, layer.alpha):
            digest.update(f"\0{path}\0{tensor.dtype}\0{tensor.numel()}\0".encode())
            digest.update(tensor.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    for name, tensor in sorted(adapter.other.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def is_road(path: str) -> bool:
    """Whether the folder `path` holds a RoAd adapter, as far as its config says."""
    try:
        return bool(checkpoint.read_config(Path(path)))
    except (OSError, ValueError):
        return False


def leave_reason(copy: str, reason: str) -> None:
    """Leave in a copy's folder why a worker refused it; whoever made the copy reads it there."""
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile("w", dir=copy, delete=False, encoding="utf-8") as file,
    ):
        file.write(reason)
        file.flush()
        os.replace(file.name, Path(copy) / _REASON)


def reason_left(copy: str) -> str:
    """Why a worker refused a copy."""
    try:
        return (Path(copy) / _REASON).read_text(encoding="utf-8")
    except OSError:
        return "the workers refused it; their log says why"


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove temporary stores of this user whose process is gone: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
        else:
            _remove(folder, lock)
