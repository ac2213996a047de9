"""What a training service remembers: by whole transactions, of one process at a time, also after a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from roadie.errors import CheckpointError, ConfigError, StateNotWritten
from roadie.train_service.database import Database, Part

WORDS = Part(
    "words", 1, "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY); CREATE INDEX IF NOT EXISTS w ON words (word)"
)


def opened(folder: Path) -> Database:
    database = Database(folder / "state.sqlite")
    database.add(WORDS)
    return database


def insert(database: Database, *added: str, durable: bool = True) -> None:
    with database.transaction(durable=durable) as write:
        for word in added:
            write("INSERT INTO words VALUES (?)", (word,))


def words(database: Database) -> list[str]:
    return [row["word"] for row in database.rows("SELECT word FROM words ORDER BY word")]


def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    database = opened(tmp_path)
    with database.transaction() as write:
        write("INSERT INTO words VALUES (?)", ("kept",))
        with database.transaction(durable=False) as inner:
            inner("INSERT INTO words VALUES (?)", ("inner",))
    with pytest.raises(sqlite3.IntegrityError):
        insert(database, "lost", "kept")
    assert words(database) == ["inner", "kept"]
    database.close()
    assert words(opened(tmp_path)) == ["inner", "kept"]


def test_a_full_disk_changes_nothing_and_is_said(tmp_path: Path) -> None:
    database = opened(tmp_path)
    (pages,) = database.rows("PRAGMA page_count")[0]
    database.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateNotWritten, match="full"):
        insert(database, "small", "large" * 10_000)
    assert words(database) == []
    insert(database, "small")
    assert words(database) == ["small"]


def test_threads_write_one_after_the_other_and_see_whole_transactions(tmp_path: Path) -> None:
    database = opened(tmp_path)
    seen: list[int] = []

    def work(name: int) -> None:
        for number in range(20):
            insert(database, f"{name} {number} a", f"{name} {number} b", durable=False)
            seen.append(database.rows("SELECT count(*) FROM words")[0][0])

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(words(database)) == 160
    assert len(seen) == 80
    assert all(count % 2 == 0 for count in seen)


def test_a_file_belongs_to_one_at_a_time(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(ConfigError, match="locked when it was opened; wanted a file that no other server"):
        Database(tmp_path / "state.sqlite")
    first.close()
    opened(tmp_path).close()


def test_tables_of_another_version_and_other_files_are_refused(tmp_path: Path) -> None:
    database = opened(tmp_path)
    with pytest.raises(CheckpointError, match="got words of version 1; wanted 2"):
        database.add(Part("words", 2, "CREATE TABLE other (a)"))
    assert database.rows("SELECT name FROM sqlite_master WHERE name = 'other'") == []
    (tmp_path / "text").write_text("not a database, whatever its size" * 100)
    with pytest.raises(CheckpointError, match="state of a training service"):
        Database(tmp_path / "text")


_KILLED = """
import sys
from pathlib import Path
from roadie.train_service.database import Database, Part
database = Database(Path(sys.argv[1]) / "state.sqlite")
database.add(Part("words", 1, "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY)"))
for number in range(10_000):
    with database.transaction(durable=number % 2 == 0) as write:
        write("INSERT INTO words VALUES (?)", (f"{number:05d}",))
        print(number, flush=True)
    print("done", number, flush=True)
"""


@pytest.mark.slow
def test_what_had_ended_outlives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(51)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()
    ended = [f"{int(line.split()[1]):05d}" for line in said if line.startswith("done")]
    assert len(ended) >= 25
    assert words(opened(tmp_path))[: len(ended)] == ended
