"""What clients have asked for, and what became of it: kept until it has been fetched and a while longer.

Each future is a row: first what was asked (`body`), with which it is done again after a restart; then its result. The id is made
of whom it is asked of and its seq_id, so that who asks twice is given the same future. Of a run the body stays until the
state that it led to is on the disk (`Runs`).
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from roadie.errors import NotFinite, StateNotWritten, UnknownTenant
from roadie.serving.http.failures import as_api_error
from roadie.train_service.database import Database, Part, Write

PART = Part(
    "tinker_futures",
    1,
    """
    CREATE TABLE IF NOT EXISTS futures (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, owner TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, body BLOB,
        made_s REAL NOT NULL, format TEXT, result BLOB, finished_s REAL, fetched_s REAL
    );
    CREATE INDEX IF NOT EXISTS futures_by_owner ON futures (owner, seq);
    CREATE INDEX IF NOT EXISTS futures_by_end ON futures (finished_s)
    """,
)
JSON, PROTOBUF = "application/json", "application/x-protobuf"
SAMPLE, CREATE = "sample", "create"
"""Kinds of which the body is not needed once there is a result."""
KEPT_AFTER_FETCH_S, KEPT_S = 600.0, 86_400.0
MAX_RESULT_BYTES = 1 << 30
"""Of all results together; the oldest go first."""


@dataclass(frozen=True)
class Result:
    """What a future came to; format: a media type."""

    format: str
    content: bytes


@dataclass(frozen=True)
class Asked:
    """A future as it was asked for; is_done: whether it has a result."""

    id: str
    tenant: str
    owner: str
    seq: int
    kind: str
    body: bytes
    is_done: bool = False

    @classmethod
    def of(cls, row: sqlite3.Row) -> Asked:
        """From a row of `futures`."""
        is_done = row["finished_s"] is not None
        return cls(row["id"], row["tenant"], row["owner"], row["seq"], row["kind"], row["body"], is_done)


def json_result(value: object) -> Result:
    """A result that is JSON."""
    return Result(JSON, json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def failure(error: BaseException) -> Result:
    """A result that is an error: of the caller where the request was to blame."""
    if isinstance(error, StateNotWritten):  # without its words, which say where files lie
        return _failed("the server could not write this down: its disk may be full; nothing has been saved", "server")
    if isinstance(error, (NotFinite, UnknownTenant)):
        return _failed(str(error), "user")
    told = as_api_error(error)
    return _failed(told.message, "user" if told.status < 500 else "server")


def _failed(message: str, category: str) -> Result:
    return json_result({"error": message[:1000], "category": category})


class Futures:
    """See the module; any thread may call, results come from one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.add(PART)
        self._lock = threading.Lock()
        rows = database.rows("SELECT id, tenant FROM futures WHERE finished_s IS NULL")
        self._waiting: dict[str, tuple[str, list[Callable[[], None]]]] = {
            row["id"]: (row["tenant"], []) for row in rows
        }
        self._unwritten: dict[str, tuple[str, Result]] = {}

    @property
    def num_waiting(self) -> int:
        """Futures without a result."""
        return len(self._waiting)

    def is_waiting(self, id: str) -> bool:
        """Whether there is such a future, without a result."""
        return id in self._waiting

    def exists(self, id: str) -> bool:
        """Whether there is such a future."""
        return id in self._waiting or bool(self._database.rows("SELECT 1 FROM futures WHERE id = ?", (id,)))

    def open(self, asked: Asked, write: Write | None = None) -> None:
        """Write down what is asked for; raises `StateNotWritten`, and it is not. write: of a transaction that it is a part of."""
        values = (asked.id, asked.tenant, asked.owner, asked.seq, asked.kind, asked.body, time.time())
        insert = (
            "INSERT OR IGNORE INTO futures (id, tenant, owner, seq, kind, body, made_s) VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        if write is not None:
            write(insert, values)
        else:
            with self._database.transaction(durable=False) as own:
                own(insert, values)
        with self._lock:
            self._waiting.setdefault(asked.id, (asked.tenant, []))

    def drop(self, id: str) -> None:
        """Forget a future that was opened and cannot be done now."""
        with self._database.transaction(durable=False) as write:
            write("DELETE FROM futures WHERE id = ?", (id,))
        self._tell(id)

    def finish(self, id: str, result: Result) -> None:
        """Give a future its result; of a sample what was asked is not needed any more."""
        try:
            self._write(id, result)
        except StateNotWritten:  # tried again by `sweep`; told meanwhile
            self._unwritten[id] = self._waiting.get(id, ("", []))[0], result
        self._tell(id)

    def _write(self, id: str, result: Result) -> None:
        with self._database.transaction(durable=False) as write:
            self.write(id, result, write)

    def write(self, id: str, result: Result, write: Write) -> None:
        """Write a result in the transaction that has the effect, so that no kill comes between; `finish` tells of it."""
        write(
            "UPDATE futures SET format = ?, result = ?, finished_s = ?, body = CASE WHEN kind IN (?, ?) THEN NULL ELSE body "
            "END WHERE id = ?",
            (result.format, result.content, time.time(), SAMPLE, CREATE, id),
        )

    def _tell(self, id: str) -> None:
        with self._lock:
            _, listeners = self._waiting.pop(id, ("", []))
        for tell in listeners:
            tell()

    async def result(self, id: str, tenant: str, seconds: float) -> Result | None:
        """The result, waited for so long; None where there is none yet. Raises `KeyError` where this tenant has none such."""
        if await self._is_pending(id, tenant, seconds):
            return None
        return await asyncio.to_thread(self._fetch, id, tenant)

    async def _is_pending(self, id: str, tenant: str, seconds: float) -> bool:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        with self._lock:
            owner, listeners = self._waiting.get(id, ("", []))
            if owner != tenant:
                return False
            listeners.append(tell)
        try:
            await asyncio.wait_for(ended.wait(), seconds)
        except asyncio.TimeoutError:
            listeners.remove(tell)
            return True
        return id in self._waiting

    def _fetch(self, id: str, tenant: str) -> Result:
        owner, unwritten = self._unwritten.get(id, ("", None))
        if unwritten is not None and owner == tenant:
            return unwritten
        query = "SELECT format, result FROM futures WHERE id = ? AND tenant = ? AND result IS NOT NULL"
        rows = self._database.rows(query, (id, tenant))
        if not rows:
            raise KeyError(id)
        with self._database.transaction(durable=False) as write:
            write("UPDATE futures SET fetched_s = ? WHERE id = ? AND fetched_s IS NULL", (time.time(), id))
        return Result(rows[0]["format"], rows[0]["result"])

    def of_owner(self, owner: str, after: int) -> list[Asked]:
        """What was asked of one, in order, from the seq_id after this one on."""
        query = "SELECT * FROM futures WHERE owner = ? AND seq > ? AND body IS NOT NULL ORDER BY seq"
        return [Asked.of(row) for row in self._database.rows(query, (owner, after))]

    def waiting(self, *, samples: bool) -> list[Asked]:
        """Those without a result, samples or all others."""
        query = f"SELECT * FROM futures WHERE finished_s IS NULL AND kind {'=' if samples else '!='} ? ORDER BY made_s"
        return [Asked.of(row) for row in self._database.rows(query, (SAMPLE,))]

    def let_go(self, owner: str, after: int = -1) -> None:
        """Nothing that was asked of this one is done again, from the seq_id after this one on."""
        with self._database.transaction(durable=False) as write:
            write("UPDATE futures SET body = NULL WHERE owner = ? AND seq > ?", (owner, after))

    def wake(self) -> None:
        """Let all who wait look again."""
        with self._lock:
            listeners = [tell for _, found in self._waiting.values() for tell in found]
        for tell in listeners:
            tell()

    def sweep(self, now_s: float) -> None:
        """Forget results that nobody is to ask for any more, and what is too much."""
        for id, (_, result) in list(self._unwritten.items()):
            self._write(id, result)
            del self._unwritten[id]
        with self._database.transaction(durable=False) as write:
            write(
                "DELETE FROM futures WHERE body IS NULL AND (fetched_s < ? OR finished_s < ?)",
                (now_s - KEPT_AFTER_FETCH_S, now_s - KEPT_S),
            )
            write(
                "DELETE FROM futures WHERE body IS NULL AND id IN (SELECT id FROM (SELECT id, SUM(LENGTH(result)) OVER "
                "(ORDER BY finished_s DESC, id) AS size FROM futures WHERE finished_s IS NOT NULL) WHERE size > ?)",
                (MAX_RESULT_BYTES,),
            )
