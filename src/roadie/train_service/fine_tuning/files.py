"""Files of tenants: what is in them in a folder, what is known of them in the database. A file is there whole, or not at all."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Row
from typing import Any

from roadie.checkpoint.replacement import sync_folder
from roadie.errors import StateNotWritten
from roadie.serving.http.failures import ApiError
from roadie.train_service.database import Database
from roadie.train_service.fine_tuning.limits import Limits

INCOMING = ".incoming-"
_ALIVE = "(expires_at IS NULL OR expires_at > ?)"
_USERS = (
    "FROM jobs WHERE status IN ('validating_files', 'queued', 'running', 'paused')"
    " AND files.id IN (training_file, validation_file)"
)


class Incoming:
    """A file that is being written; whoever has it calls `Files.keep`, and then `close`, whatever happened."""

    def __init__(self, files: Files, tenant: str, *, is_limited: bool = True) -> None:
        self._files, self.tenant, self.id = files, tenant, f"file-{secrets.token_hex(12)}"
        self._is_limited = is_limited
        self.path = files.folder / f"{INCOMING}{self.id}"
        self.num_bytes = 0
        with _disk(self.path):
            self._stream = self.path.open("wb")

    def write(self, data: bytes) -> None:
        """Some more of it. Raises `ApiError` for more than a tenant may have, `StateNotWritten` for a full disk."""
        if self._is_limited:
            self._files.count(self.tenant, self.num_bytes, len(data))
        self.num_bytes += len(data)
        with _disk(self.path):
            self._stream.write(data)

    def sync(self) -> None:
        """All of it is on the disk."""
        with _disk(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """What has not been kept is gone."""
        if self._is_limited:
            self._files.count(self.tenant, 0, -self.num_bytes)
        with suppress(OSError):
            self._stream.close()
        self.path.unlink(missing_ok=True)


class Files:
    """See the module; thread-safe. What an earlier process left half done is removed."""

    def __init__(self, folder: Path, database: Database, limits: Limits) -> None:
        self.folder, self._database, self._limits = folder, database, limits
        self._incoming: Counter[str] = Counter()
        self._lock = threading.Lock()
        folder.mkdir(exist_ok=True)
        known = {row["id"] for row in database.rows("SELECT id FROM files")}
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
        self._remove_expired()

    def receive(self, tenant: str) -> Incoming:
        """A file begins to come in. Raises `StateNotWritten`."""
        self._remove_expired()
        return Incoming(self, tenant)

    def count(self, tenant: str, so_far: int, more: int) -> None:
        """Bytes of a file that comes in: so many so far, and more. Raises `ApiError` for too many."""
        if so_far + more > self._limits.max_file_bytes:
            raise ApiError(
                413,
                f"got a file of more than {self._limits.max_file_bytes} bytes; send less",
                "file_too_long",
                param="file",
            )
        with self._lock:
            self._incoming[tenant] += more
            coming = self._incoming[tenant]
        if more > 0 and self._num_bytes(tenant) + coming > self._limits.max_tenant_bytes:
            with self._lock:
                self._incoming[tenant] -= more
            message = (
                f"got more than {self._limits.max_tenant_bytes} bytes in files of yours; wanted fewer; delete some"
            )
            raise ApiError(413, message, "storage_limit", param="file")

    def _num_bytes(self, tenant: str) -> int:
        (row,) = self._database.rows("SELECT coalesce(sum(bytes), 0) AS bytes FROM files WHERE tenant = ?", (tenant,))
        return int(row["bytes"])

    def keep(self, incoming: Incoming, filename: str, purpose: str, expires_s: int | None = None) -> dict[str, Any]:
        """A file that came in is there from now on; what is told of it. Raises `StateNotWritten`."""
        incoming.sync()
        now = int(time.time())
        with self._database.transaction() as write:
            write(
                "INSERT INTO files (id, tenant, filename, bytes, purpose, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(incoming.id, incoming.tenant, filename, incoming.num_bytes, purpose),
                    *(now, None if expires_s is None else now + expires_s),
                ),
            )
            with _disk(incoming.path):
                incoming.path.replace(self.folder / incoming.id)
                sync_folder(self.folder)
        return self.one(incoming.tenant, incoming.id)

    def add(self, tenant: str, filename: str, purpose: str, content: bytes) -> str:
        """A file that the server makes; its id. Raises `StateNotWritten`."""
        incoming = Incoming(self, tenant, is_limited=False)
        try:
            incoming.write(content)
            self.keep(incoming, filename, purpose)
        finally:
            incoming.close()
        return incoming.id

    def one(self, tenant: str, file_id: str) -> dict[str, Any]:
        """What is told of a file. Raises `ApiError`: 404 where the tenant has none of that id."""
        rows = self._database.rows(
            f"SELECT * FROM files WHERE id = ? AND tenant = ? AND {_ALIVE}", (file_id, tenant, time.time())
        )
        if not rows:
            raise ApiError(404, f"No such File object: {file_id[:200]}", "not_found", "not_found_error", param="id")
        return _as_json(rows[0])

    def path(self, tenant: str, file_id: str) -> Path:
        """Where the content of a file is; raises as `one` does."""
        return self.folder / str(self.one(tenant, file_id)["id"])

    def page(
        self, tenant: str, limit: int, after: str | None, purpose: str | None, *, is_newest_first: bool
    ) -> list[Any]:
        """Some files of a tenant in order, one more than the limit where there are more. Raises as `one` does."""
        place = 0 if after is None else self._number(tenant, after)
        sign, order = ("<", "DESC") if is_newest_first else (">", "ASC")
        rows = self._database.rows(
            f"SELECT * FROM files WHERE tenant = ? AND {_ALIVE} AND (? IS NULL OR number {sign} ?) AND (? IS NULL OR purpose = ?)"
            f" ORDER BY number {order} LIMIT ?",
            (tenant, time.time(), after, place, purpose, purpose, limit + 1),
        )
        return [_as_json(row) for row in rows]

    def _number(self, tenant: str, file_id: str) -> int:
        self.one(tenant, file_id)
        (row,) = self._database.rows("SELECT number FROM files WHERE id = ?", (file_id,))
        return int(row["number"])

    def delete(self, tenant: str, file_id: str) -> None:
        """A file is gone. Raises as `one` does, and `ApiError` (409) where a job that has not ended learns from it."""
        self.one(tenant, file_id)
        with self._database.transaction() as write:
            user = write(f"SELECT (SELECT id {_USERS}) FROM files WHERE id = ?", (file_id,)).fetchone()
            if user and user[0]:
                message = f"got file {file_id!r}, which {user[0]} learns from; cancel that first, or wait"
                raise ApiError(409, message, "file_in_use", "conflict_error", param="id")
            write("DELETE FROM files WHERE id = ?", (file_id,))
        (self.folder / file_id).unlink(missing_ok=True)

    def _remove_expired(self) -> None:
        gone = f"NOT {_ALIVE} AND NOT EXISTS (SELECT 1 {_USERS})"
        rows = self._database.rows(f"SELECT id FROM files WHERE {gone}", (time.time(),))
        if not rows:
            return
        with self._database.transaction() as write:
            for row in rows:
                write("DELETE FROM files WHERE id = ?", (row["id"],))
        for row in rows:
            (self.folder / row["id"]).unlink(missing_ok=True)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateNotWritten(f"{path}: got {error.strerror} when a file was written; nothing has changed") from None


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }
