"""Folders of weights, each under a name of its own: checkpoints, and what runs go on from.

A folder is whole before anything refers to it. One to which nothing refers is what a kill has left, and is removed at the start.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError

from roadie import checkpoint
from roadie.adapter import Adapter
from roadie.engine import TenantState
from roadie.errors import CheckpointError, StateNotWritten


class Store:
    """See the module. Raises `StateNotWritten` where the folder cannot be made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateNotWritten(f"{root}: got {error.strerror}; wanted a folder for weights") from None

    def path(self, folder: str) -> Path:
        """Where a folder is."""
        return self.root / folder

    def save_state(self, state: TenantState) -> str:
        """A new folder of weights, moments and step; raises `StateNotWritten`, and there is none then."""
        return self._new(state.save)

    def save_adapter(self, adapter: Adapter) -> str:
        """The same of the weights alone."""
        return self._new(lambda folder: checkpoint.save(adapter, folder))

    def load_state(self, folder: str) -> TenantState:
        """What `save_state` has written; raises `CheckpointError` where it is gone, or damaged."""
        return TenantState.load(self.path(folder))

    def files(self, folder: str) -> list[Path]:
        """Those of a folder, by name."""
        return sorted(each for each in self.path(folder).iterdir() if each.is_file())

    def num_bytes(self, folder: str) -> int:
        """Of all its files."""
        return sum(each.stat().st_size for each in self.files(folder))

    def remove(self, folder: str | None) -> None:
        """A folder, where there is one."""
        if folder is not None:
            shutil.rmtree(self.path(folder), ignore_errors=True)

    def keep_only(self, folders: Collection[str]) -> None:
        """Remove what nothing refers to."""
        for each in self.root.iterdir():
            if each.name not in folders:
                shutil.rmtree(each, ignore_errors=True)

    def _new(self, save: Callable[[Path], object]) -> str:
        folder = uuid.uuid4().hex
        try:
            save(self.path(folder))
        except (OSError, SafetensorError, CheckpointError) as error:
            with contextlib.suppress(OSError):
                self.remove(folder)
            is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if is_full else f"it could not be written ({error})"
            raise StateNotWritten(f"{reason}; nothing has been saved; save again when there is room") from None
        return folder
