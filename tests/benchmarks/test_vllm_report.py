"""The table of docs/vllm.md is what the newest record says."""

from __future__ import annotations

from benchmarks import vllm_report


def test_the_guide_has_the_table_of_the_newest_record() -> None:
    guide, record = vllm_report.DOCUMENT.read_text(encoding="utf-8"), vllm_report.newest()
    assert vllm_report.table(record) in guide
    assert vllm_report.with_table(guide, record) == guide


def test_another_record_is_another_table() -> None:
    entry = {"tokens_per_s": 12.3, "of_base": {"value": 0.5, "low": 0.4, "high": 0.6}}
    load = {"model": "M", "requests": 1, "prompt_tokens": 2, "new_tokens": 3}
    record = {
        "load": load,
        "versions": {"vllm": "9"},
        "device": "D",
        "cores": 1,
        "date": "2026-01-02T03",
        "commit": "c",
        "entries": {"roadie": entry},
    }
    guide = vllm_report.with_table(vllm_report.DOCUMENT.read_text(encoding="utf-8"), record)
    assert "| roadie          | 12              | 0.500 (0.400 to 0.600) |" in guide
    assert guide.count("<!-- end -->") == 1
