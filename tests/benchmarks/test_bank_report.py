"""docs/many-adapters-results.md comes from the committed records and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import bank_report, machine


def test_the_document_is_what_the_records_say() -> None:
    records = sorted((machine.ROOT / "benchmarks" / "results").glob("*/bank-*.json"))
    assert bank_report.DOCUMENT.read_text(encoding="utf-8") == bank_report.text_of(bank_report.newest(records))
    assert bank_report.PICTURE.is_file()


def test_the_newest_record_of_each_part_counts(tmp_path: Path) -> None:
    def entry(wrong: int) -> dict[str, object]:
        return {"what": "stress", "seconds": 60.0, "rows_checked": 10, "wrong": wrong, "admissions": 5}

    for name, date, wrong in (("bank-z.json", "2026-01-01", 3), ("bank-a.json", "2026-02-01", 0)):
        record = {"commit": name, "date": date, "machine": "m", "entries": [entry(wrong)]}
        (tmp_path / name).write_text(json.dumps(record))
    text = bank_report.text_of(bank_report.newest(list(tmp_path.iterdir())))
    assert "10 rows were checked, 0 were wrong" in text
    assert "2026-02-01" in text
    assert "3 were wrong" not in text
