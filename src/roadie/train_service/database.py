"""What a service remembers: one SQLite file, to which each part of the service adds tables of its own.

    database = Database(folder / "state.sqlite")
    database.add(Part("files", 1, "CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, tenant TEXT NOT NULL)"))
    with database.transaction() as write:            # all of it or nothing; on the disk when the block has ended
        write("INSERT INTO files VALUES (?, ?)", (id, tenant))
    database.rows("SELECT id FROM files WHERE tenant = ?", (tenant,))

There is one connection, under a lock, so that any thread may call and no reader sees half of a transaction. Blocks are short:
whatever takes long, a file or the model, is done before. The file belongs to one process at a time, which the operating system
sees to: a process that was killed leaves no lock behind, and all transactions that had ended.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from roadie.errors import CheckpointError, ConfigError, StateNotWritten

Value: TypeAlias = "str | bytes | int | float | None"
Write: TypeAlias = Callable[..., sqlite3.Cursor]
"""`write(statement, values)`, within a transaction; what a query gives are rows that are read by column."""

_OPENING = """
PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS parts (name TEXT PRIMARY KEY, version INTEGER NOT NULL); COMMIT;
"""


@dataclass(frozen=True)
class Part:
    """Tables of one part of a service. schema: statements that change nothing where the tables are there already.

    version: goes up where the tables of older versions do not fit any more.
    """

    name: str
    version: int
    schema: str


class Database:
    """See the module. Raises `ConfigError` where another process has the file, `CheckpointError` where it is no database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._is_durable = True
        self._in_transaction = False
        try:
            self._connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.executescript(_OPENING)
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"{path}: got {error} when it was opened; wanted a file that no other server has open; stop that one, or "
                "name another folder"
            ) from None
        except sqlite3.DatabaseError as error:
            raise CheckpointError(f"{path}: got {error}; wanted the state of a training service") from None

    def add(self, part: Part) -> None:
        """Make the tables of a part where they are not there; raises `CheckpointError` where another version wrote them."""
        with self.transaction() as write:
            for statement in filter(str.strip, part.schema.split(";")):
                write(statement)
            write("INSERT INTO parts VALUES (?, ?) ON CONFLICT DO NOTHING", (part.name, part.version))
            (found,) = write("SELECT version FROM parts WHERE name = ?", (part.name,)).fetchone()
            if found != part.version:
                raise CheckpointError(
                    f"{self.path}: got {part.name} of version {found}; wanted {part.version}; use the release that wrote it, "
                    "or another folder"
                )

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Write]:
        """A block that happens as a whole; one within another is a part of it.

        durable: it outlives a loss of power, for which the disk is waited for; otherwise the end of the process alone. Raises
        `StateNotWritten` where it cannot be written (a full disk), and nothing has changed then.
        """
        with self._lock:
            if self._in_transaction:
                yield self._connection.execute
                return
            self._set_durable(durable)
            self._in_transaction = True
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise StateNotWritten(f"{self.path}: got {error} when it was written; nothing has changed") from None
            finally:
                self._in_transaction = False
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[sqlite3.Row]:
        """What a query gives, as it is after the last transaction."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Let another process have the file."""
        with self._lock:
            self._connection.close()

    def _set_durable(self, durable: bool) -> None:
        if durable != self._is_durable:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._is_durable = durable
