"""Records: a line of JSON a run, in one file a task; added when the run ends and never changed."""

from __future__ import annotations

import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, machine_name, now
from benchmarks.record import RESULTS, rounded

LIBRARIES = ("torch", "peft", "transformers")
Record = dict[str, Any]


def folder(results: Path = RESULTS) -> Path:
    """Where the records of this machine are."""
    return results / machine_name() / "quality"


def real_folder(results: Path = RESULTS, device: str = "cpu") -> Path:
    """Where this machine's records of real language models are."""
    return results / machine_name(device.partition(":")[0]) / "quality-real"


def provenance() -> Record:
    """Commit, versions and machine: read once, when the process starts."""
    return {**commit(), "versions": {name: version(name) for name in LIBRARIES}, "machine": machine_name()}


def add(path: Path, record: Record) -> None:
    """Write one more line, and see it on the disk before the next run starts; a line that a kill tore is taken off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    line = json.dumps(_plain(rounded({**record, "date": now()})), ensure_ascii=False) + "\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[Record]:
    """All whole lines of a file; empty where there is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def key(record: Record) -> tuple[str, float, int]:
    """What makes a run another one within its task: method, learning rate and seed."""
    return record["method"], record["learning_rate"], record["seed"]


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def _plain(value: Any) -> Any:
    """The value without the numbers JSON has no words for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
