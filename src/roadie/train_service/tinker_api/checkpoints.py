"""Checkpoints: weights that a client has saved by name, until they are deleted or expire."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

from roadie.engine import TenantState
from roadie.errors import ConfigError
from roadie.train_service.database import Write
from roadie.train_service.tinker_api.records import EPHEMERAL, SEGMENTS, Checkpoint, Records, new_id
from roadie.train_service.tinker_api.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}")
MAX_TTL_S = 10 * 366 * 86_400
MAX_EPHEMERAL = 64
"""Snapshots of one run that have no name: those sampled from last stay."""


class Checkpoints:
    """See the module. on_gone: told of each that is no longer there."""

    def __init__(self, records: Records, store: Store, on_gone: Callable[[Checkpoint], None]) -> None:
        self._records, self._store, self._on_gone = records, store, on_gone

    def id_of(self, run: str, kind: str, name: str) -> str:
        """Of the one that is there, or of one to come."""
        found = self._records.where(Checkpoint, "run = ? AND kind = ? AND name = ?", (run, kind, name))
        return found[0].id if found else new_id()

    def add(
        self, checkpoint: Checkpoint, state: TenantState, also: Callable[[Write], None], *, overwrite: bool = False
    ) -> None:
        """Save weights (and the optimiser, of a training checkpoint); when this returns they outlive the process.

        also: what is written in the same transaction.
        Raises `ConfigError` for a name that cannot be one, or is taken, and `StateNotWritten`; nothing has changed then.
        """
        if not _NAME.fullmatch(checkpoint.name):
            raise ConfigError(
                f"got the name {ascii(checkpoint.name)[:120]}; wanted 1 to 100 characters A-Z a-z 0-9 _ . : -, the first no sign"
            )
        key = (checkpoint.run, checkpoint.kind, checkpoint.name)
        before = self._records.where(Checkpoint, "run = ? AND kind = ? AND name = ?", key)
        if before and not overwrite:
            raise ConfigError(
                f"got the name {checkpoint.name!r}, which a checkpoint of this run has; use another, or overwrite"
            )
        whole = checkpoint.kind == "training"
        folder = self._store.save_state(state) if whole else self._store.save_adapter(state.adapter)
        saved = replace(checkpoint, folder=folder, num_bytes=self._store.num_bytes(folder))
        try:
            with self._records.transaction() as write:
                self._records.put(saved, write)
                also(write)
        except Exception:
            self._store.remove(folder)
            raise
        for each in before:
            if each.id != saved.id:
                self._on_gone(each)
            self._store.remove(each.folder)

    def copy(self, path: str, tenant: str, *, with_optimiser: bool) -> str:
        """A new folder with what is in a training checkpoint. Raises `ApiError` (404), `ConfigError`, `StateNotWritten`."""
        found = self._records.checkpoint_at(path, tenant)
        if with_optimiser and found.kind != "training":
            raise ConfigError(
                f"got {path!r}, which has no optimiser's state; wanted a checkpoint of save_state, or weights alone"
            )
        state = self._store.load_state(found.folder)
        return self._store.save_state(state if with_optimiser else TenantState(state.adapter, share=state.share))

    def delete(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, and its files."""
        self._records.forget(checkpoint.id)
        self._on_gone(checkpoint)
        self._store.remove(checkpoint.folder)

    def set_ttl(self, checkpoint: Checkpoint, seconds: float | None) -> None:
        """Let it expire so many seconds from now, or never; raises `ConfigError`."""
        check_ttl(seconds)
        self._records.change(Checkpoint, checkpoint.id, expires_s=None if seconds is None else time.time() + seconds)

    def sweep(self, now_s: float) -> None:
        """Delete what has expired, and snapshots without a name that are too many."""
        ranked = "SELECT id, RANK() OVER (PARTITION BY run ORDER BY used_s DESC, id) AS place FROM checkpoints WHERE kind = ?"
        condition = f"(expires_s IS NOT NULL AND expires_s <= ?) OR id IN (SELECT id FROM ({ranked}) WHERE place > ?)"
        for each in self._records.where(Checkpoint, condition, (now_s, EPHEMERAL, MAX_EPHEMERAL)):
            self.delete(each)


LISTED = f"kind IN ({', '.join(repr(kind) for kind in SEGMENTS)})"
"""Which checkpoints clients see in lists."""


def check_ttl(seconds: float | None) -> None:
    """Raise `ConfigError` for a time that no checkpoint can have."""
    if seconds is not None and not 0 < seconds <= MAX_TTL_S:
        raise ConfigError(f"got ttl_seconds={str(seconds)[:40]}; wanted above 0 and at most ten years, or none")
