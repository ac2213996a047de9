"""Records: one JSON file a run, ``benchmarks/results/<machine>/<date>-<commit>.json``; never rewritten by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ROOT / ".cache" / "benchmarks"
SCHEMA = 1
CPU, GPU = "cpu", "gpu"


def path_of(record: dict[str, Any]) -> Path:
    """Where a record belongs: quick ones outside the tree of results."""
    folder = (QUICK if record["quick"] else RESULTS) / record["machine"]["name"]
    suffix = "-gpu" if record["kind"] == GPU else ""
    return folder / f"{record['date'][:10]}-{record['commit']}{suffix}.json"


def write(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record to its place (or to `path`), keys in order, a line an entry of a list, so that differences can be read."""
    path = path or path_of(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """A record; raises ValueError for one of another schema."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"got schema {record.get('schema')} in {path}; wanted {SCHEMA}; make the record anew")
    return record


def newest(kind: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """The committed record of a kind ("cpu" or "gpu") with the latest date, or None where there is none."""
    records = [read(path) for path in sorted(results.glob("*/*.json")) if _is_record(path)]
    return max((r for r in records if r["kind"] == kind), key=lambda record: record["date"], default=None)


def _is_record(path: Path) -> bool:
    """Other benchmarks keep their results beside ours: a record says its schema and kind."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("suite") == "roadie benchmarks"


def rounded(value: Any) -> Any:
    """The value with floats of six digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def start(kind: str, machine: dict[str, Any], date: str, commit: dict[str, Any], quick: bool) -> dict[str, Any]:
    """A record without entries."""
    head = {"suite": "roadie benchmarks", "schema": SCHEMA, "kind": kind, "quick": quick, "date": date, **commit}
    return {**head, "machine": machine, "entries": []}
