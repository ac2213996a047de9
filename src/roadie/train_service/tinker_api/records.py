"""What there is: sessions, runs, checkpoints and samplers of tenants, each seen by its own tenant alone."""

from __future__ import annotations

import json
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from roadie.serving.http.failures import ApiError
from roadie.train_service.database import Database, Part, Value, Write

PART = Part(
    "tinker",
    1,
    """
    CREATE TABLE IF NOT EXISTS sessions (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, made_s REAL NOT NULL, heard_s REAL NOT NULL, is_finished INTEGER NOT NULL,
        display_name TEXT, metadata TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS runs (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT NOT NULL, made_s REAL NOT NULL, asked_s REAL NOT NULL,
        base_model TEXT NOT NULL, lora TEXT NOT NULL, config TEXT NOT NULL, metadata TEXT NOT NULL, kept TEXT,
        kept_seq INTEGER NOT NULL, is_over INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS checkpoints (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
        folder TEXT NOT NULL, num_bytes INTEGER NOT NULL, made_s REAL NOT NULL, expires_s REAL, used_s REAL NOT NULL,
        lora TEXT NOT NULL, base_model TEXT NOT NULL, metadata TEXT NOT NULL, UNIQUE (run, kind, name)
    );
    CREATE TABLE IF NOT EXISTS samplers (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, session TEXT NOT NULL, made_s REAL NOT NULL, base_model TEXT NOT NULL,
        checkpoint TEXT, path TEXT, num_clients INTEGER NOT NULL
    );
    CREATE INDEX IF NOT EXISTS runs_of_tenant ON runs (tenant, made_s);
    CREATE INDEX IF NOT EXISTS checkpoints_of_tenant ON checkpoints (tenant, made_s)
    """,
)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
Record = TypeVar("Record", "Session", "Run", "Checkpoint", "Sampler")


@dataclass(frozen=True)
class Session:
    """What a client has opened."""

    id: str
    tenant: str
    made_s: float
    heard_s: float
    is_finished: int = 0
    display_name: str | None = None
    metadata: str = "{}"


@dataclass(frozen=True)
class Run:
    """A model in training. lora, metadata: JSON, as asked; config: JSON, RoAd's words; kept: the folder that it goes on from.

    kept_seq: the last request that is in that folder; is_over: whether it was unloaded.
    """

    id: str
    tenant: str
    session: str
    made_s: float
    asked_s: float
    base_model: str
    lora: str
    config: str
    metadata: str = "{}"
    kept: str | None = None
    kept_seq: int = 0
    is_over: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were saved. kind: one of `SEGMENTS`, or "ephemeral" and "inflight", which are not listed."""

    id: str
    tenant: str
    run: str
    kind: str
    name: str
    folder: str
    num_bytes: int
    made_s: float
    expires_s: float | None
    used_s: float
    lora: str
    base_model: str
    metadata: str = "{}"

    @property
    def path(self) -> str:
        """As clients name it."""
        return f"tinker://{self.run}/{SEGMENTS.get(self.kind, self.kind)}/{self.name}"


SEGMENTS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
KINDS = {segment: kind for kind, segment in SEGMENTS.items()}
EPHEMERAL, INFLIGHT = "ephemeral", "inflight"


@dataclass(frozen=True)
class Sampler:
    """Weights to sample from, in one session. checkpoint: None for the base model; path: as the client named it."""

    id: str
    tenant: str
    session: str
    made_s: float
    base_model: str
    checkpoint: str | None = None
    path: str | None = None
    num_clients: int = 0


_TABLES: Mapping[type, str] = {Session: "sessions", Run: "runs", Checkpoint: "checkpoints", Sampler: "samplers"}


def unknown(what: str, name: str) -> ApiError:
    """404, the same for what does not exist and for what is another tenant's."""
    return ApiError(
        404, f"there is no {what} {ascii(name)[:200]}, or this key may not use it", "not_found", "not_found_error"
    )


class Records:
    """See the module. What is put is on the disk when the call returns; raises `StateNotWritten`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.add(PART)

    def put(self, record: Record, write: Write | None = None) -> None:
        """Write a new record down, or one again. write: of a transaction that it is a part of."""
        names = [each.name for each in fields(record)]
        statement = f"INSERT OR REPLACE INTO {_TABLES[type(record)]} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        values = [getattr(record, name) for name in names]
        if write is not None:
            write(statement, values)
            return
        with self._database.transaction() as own:
            own(statement, values)

    def find(self, kind: type[Record], id: str, tenant: str | None = None) -> Record | None:
        """The record of this id; tenant: whose it has to be."""
        if not isinstance(id, str) or not _ID.fullmatch(id):
            return None
        rows = self._database.rows(f"SELECT * FROM {_TABLES[kind]} WHERE id = ?", (id,))
        found = _record(kind, rows[0]) if rows else None
        return found if found is not None and tenant in (None, found.tenant) else None

    def require(self, kind: type[Record], id: str, tenant: str) -> Record:
        """The same; raises `ApiError` (404) where this tenant has none."""
        found = self.find(kind, id, tenant)
        if found is None:
            raise unknown(
                {Session: "session", Run: "training run", Checkpoint: "checkpoint", Sampler: "sampler"}[kind], id
            )
        return found

    def where(self, kind: type[Record], condition: str, values: Sequence[Value] = ()) -> list[Record]:
        """All that a condition of SQL holds for, the newest first unless it says otherwise."""
        order = "" if "ORDER BY" in condition else " ORDER BY made_s DESC, id"
        return [
            _record(kind, row)
            for row in self._database.rows(f"SELECT * FROM {_TABLES[kind]} WHERE {condition}{order}", values)
        ]

    def count(self, kind: type[Any], condition: str, values: Sequence[Value] = ()) -> int:
        """How many there are."""
        return int(self._database.rows(f"SELECT COUNT(*) FROM {_TABLES[kind]} WHERE {condition}", values)[0][0])

    def change(
        self,
        kind: type[Any],
        id: str,
        also: Callable[[Write], None] = lambda _: None,
        *,
        durable: bool = True,
        **values: Value,
    ) -> None:
        """Set some of a record's values; also: what is written in the same transaction."""
        with self._database.transaction(durable=durable) as write:
            also(write)
            settings = ", ".join(f"{name} = ?" for name in values)
            write(f"UPDATE {_TABLES[kind]} SET {settings} WHERE id = ?", (*values.values(), id))

    def delete(self, kind: type[Any], id: str) -> None:
        """Forget a record."""
        with self._database.transaction() as write:
            write(f"DELETE FROM {_TABLES[kind]} WHERE id = ?", (id,))

    def transaction(self) -> AbstractContextManager[Write]:
        """See `Database.transaction`."""
        return self._database.transaction()

    def keep(self, run: str, seq: int, folder: str | None, also: Callable[[Write], None] = lambda _: None) -> None:
        """A run goes on from this folder, and what was asked of it up to this seq_id need not be done again; `also` with it."""
        with self._database.transaction() as write:
            also(write)
            write("UPDATE runs SET kept = ?, kept_seq = ?, asked_s = ? WHERE id = ?", (folder, seq, time.time(), run))
            write("UPDATE futures SET body = NULL WHERE owner = ? AND seq <= ? AND finished_s IS NOT NULL", (run, seq))

    def forget(self, checkpoint: str) -> None:
        """Forget a checkpoint, and who samples from it."""
        with self._database.transaction() as write:
            write("DELETE FROM checkpoints WHERE id = ?", (checkpoint,))
            write("DELETE FROM samplers WHERE checkpoint = ?", (checkpoint,))

    def join(self, sampler: str) -> int:
        """One more client of a sampler; its number, from 1."""
        with self._database.transaction() as write:
            write("UPDATE samplers SET num_clients = num_clients + 1 WHERE id = ?", (sampler,))
            return int(write("SELECT num_clients FROM samplers WHERE id = ?", (sampler,)).fetchone()[0])

    def folders(self) -> set[str]:
        """All that anything refers to."""
        query = "SELECT folder FROM checkpoints UNION SELECT kept FROM runs WHERE kept IS NOT NULL"
        return {row[0] for row in self._database.rows(query)}

    def checkpoint_at(self, path: str, tenant: str) -> Checkpoint:
        """The one that a client names so; raises `ApiError` (404)."""
        parts = path.removeprefix("tinker://").split("/") if path.startswith("tinker://") else []
        if len(parts) == 3 and parts[1] in KINDS and all(_ID.fullmatch(part) for part in parts):
            values = (parts[0], KINDS[parts[1]], parts[2], tenant, time.time())
            condition = "run = ? AND kind = ? AND name = ? AND tenant = ? AND (expires_s IS NULL OR expires_s > ?)"
            found = self.where(Checkpoint, condition, values)
            if found:
                return found[0]
        raise unknown("checkpoint", path)


def _record(kind: type[Record], row: sqlite3.Row) -> Record:
    return kind(**{each.name: row[each.name] for each in fields(kind)})


def new_id() -> str:
    """An id that nobody can guess."""
    return uuid.uuid4().hex


def dumped(value: Any) -> str:
    """JSON, as records hold it."""
    return json.dumps(value if value is not None else {})
