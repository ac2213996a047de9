"""docs/performance.md comes from the committed record and from nothing else, and its verdicts say what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from benchmarks import plan, record, report, run
from benchmarks.harness import Budget
from benchmarks.losses import losses
from benchmarks.machine import machine_name, slug
from benchmarks.rivals import FROZEN, PEFT_IA3, PEFT_LORA, PEFT_ROAD, RIVALS, ROADIE, ROADIE_STAGES
from benchmarks.verdicts import inverted, verdicts
from benchmarks.workloads import kept, with_limit
from benchmarks.workloads.model import ModelSize
from benchmarks.workloads.rotation import COPY, PEFT_APPLY

DOCUMENT = report.DOCS / "performance.md"


def test_the_document_is_what_the_newest_record_gives() -> None:
    newest = record.newest(record.CPU)
    if newest is None:
        assert not DOCUMENT.exists(), f"{DOCUMENT} comes from no record"
        pytest.skip("no record is committed yet: make bench writes one")
    assert DOCUMENT.read_text(encoding="utf-8") == report.text_of(newest, record.newest(record.GPU))
    for image in re.findall(r"\]\((images/[^)]+)\)", DOCUMENT.read_text(encoding="utf-8")):
        assert (report.DOCS / image).exists(), image


def rival(ratio: tuple[float, float, float], over_roadie: tuple[float, float, float] | None = None) -> dict[str, Any]:
    made = {"median_ms": ratio[0], "q1_ms": ratio[0], "q3_ms": ratio[0], "ratio": as_interval(ratio)}
    return made if over_roadie is None else {**made, "ratio_to_roadie": as_interval(over_roadie)}


def as_interval(numbers: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), numbers, strict=True))


def timed(
    workload: str, case: dict[str, Any], rivals: dict[str, Any], base: str = FROZEN, **more: Any
) -> dict[str, Any]:
    head = {"workload": workload, "case": case, "threads": 1, "rounds": 9, "calls": 1, "base": base}
    return with_limit({**head, "bytes_moved": 8, "rivals": rivals, **more}, {"1": 1e9})


def synthetic() -> dict[str, Any]:
    """A record in which every bound is met, made by hand."""
    one, slower = (1.0, 1.0, 1.0), (1.2, 1.1, 1.3)
    rivals = {
        FROZEN: rival(one, one),
        ROADIE: rival((1.021, 1.019, 1.03)),
        **{name: rival(slower, slower) for name in (PEFT_ROAD, PEFT_LORA, PEFT_IA3)},
    }
    sizes = {"in_features": 4096, "out_features": 4096, "tokens": 4096}
    copying = {COPY: rival(one, one), ROADIE: rival((1.4, 1.3, 1.6)), PEFT_APPLY: rival((30, 29, 31), (22, 20, 24))}
    amounts = {FROZEN: 100, ROADIE: 120, PEFT_ROAD: 200, PEFT_LORA: 150, PEFT_IA3: 160}
    of_silu = {
        f"{ROADIE} road_1": {"per_element": 0.0, "fixed": 1024},
        f"{ROADIE} road_2": {"per_element": 4.0, "fixed": 0},
        PEFT_LORA: {"per_element": 2.5, "fixed": 0},
    }
    what = {"what": kept.SILU, "precision": "fp32", "mode": "eager"}
    model = {"mode": "training step", "precision": "fp32", "rows": 2, "tokens": 256, "size": asdict(ModelSize())}
    step = {"precision": "fp32", "threads": 1, "adapters": 1}
    all_of = {**rivals, ROADIE_STAGES: rival(slower, slower)}
    sizes_of_model = {"model": "Some-Llama", "parameters": 135_000_000, "adapted_layers": 210}
    entries = [
        timed("layer", {"mode": "forward", "precision": "bf16", **sizes}, rivals),
        timed("layer", {"mode": "forward+backward", "precision": "bf16", **sizes}, rivals),
        timed("rotation", {"precision": "fp32", "tokens": 4096, "out_features": 4096, "threads": 1}, copying, COPY),
        timed("model", model, rivals, bytes=amounts, parameters=162_000_000),
        {"workload": "kept", "case": what, "bytes": of_silu},
        {"workload": "kept", "case": {**what, "mode": kept.PARTITIONED}, "bytes": of_silu},
        {"workload": "peak", "case": {"what": "model", **model}, "bytes": amounts},
        timed("checkpoint", {"mode": "decode", "rows": 8, "tokens": 32, **step}, all_of, **sizes_of_model),
        timed("checkpoint", {"mode": "training step", "rows": 1, "tokens": 64, **step}, all_of, **sizes_of_model),
    ]
    machine = {
        "name": "some-cpu-2-cores",
        "processor": "Some CPU",
        "cores": 2,
        "capability": "AVX2",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "default_threads": 2,
        "load_average": [0.1, 0.2, 0.3],
        "copy_bytes_per_s": {"1": 4e10, "2": 6e10},
    }
    head = record.start(record.CPU, machine, "2026-01-02T03:04:05Z", {"commit": "abc", "dirty": False}, quick=False)
    return {
        **head,
        "entries": entries,
        "load_average_end": [1.0, 1.0, 1.0],
        "duration_s": 840.0,
        "failures": [],
        "left_out": [],
    }


def by_line(made: dict[str, Any]) -> dict[int, list[bool]]:
    found: dict[int, list[bool]] = {}
    for verdict in verdicts(made):
        found.setdefault(verdict.line, []).append(verdict.met)
    return found


def test_every_line_has_verdicts() -> None:
    found = by_line(synthetic())
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    assert all(all(met) for met in found.values())


def change(made: dict[str, Any], index: int, *path: Any, value: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(made))  # entries that share parts share them no more
    target = made["entries"][index]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("line", "index", "path", "value"),
    [
        (1, 7, ("rivals", ROADIE, "ratio", "low"), 1.0201),
        (1, 7, ("rivals", PEFT_IA3, "ratio_to_roadie"), as_interval((0.97, 0.96, 0.99))),
        (1, 8, ("rivals", ROADIE, "ratio", "low"), 1.1001),
        (2, 4, ("bytes", f"{ROADIE} road_1", "per_element"), 4.0),
        (2, 4, ("bytes", f"{ROADIE} road_2", "per_element"), 8.0),
        (3, 0, ("rivals", ROADIE, "ratio", "low"), 1.0201),
        (3, 1, ("rivals", ROADIE, "ratio", "low"), 1.0401),
        (3, 0, ("rivals", PEFT_IA3, "ratio_to_roadie"), as_interval((0.97, 0.96, 0.99))),
        (4, 2, ("rivals", ROADIE, "ratio"), as_interval((1.6, 1.5, 1.7))),
        (4, 2, ("rivals", PEFT_APPLY, "ratio_to_roadie", "high"), 14.9),
        (5, 3, ("rivals", ROADIE, "ratio"), as_interval((1.1, 1.06, 1.2))),
        (5, 3, ("bytes", ROADIE), 131),
        (5, 3, ("bytes", PEFT_LORA), 119),
        (5, 3, ("rivals", PEFT_ROAD, "ratio_to_roadie"), as_interval((0.9, 0.8, 0.99))),
        (6, 5, ("bytes", f"{ROADIE} road_1", "per_element"), 4.0),
    ],
)
def test_a_bound_that_is_missed_is_said_to_be(line: int, index: int, path: tuple[Any, ...], value: Any) -> None:
    made = change(synthetic(), index, *path, value=value)
    found = by_line(made)
    assert found[line].count(False) == 1
    assert all(all(met) for other, met in found.items() if other != line)
    text = report.text_of(made, None)
    assert text.count("**NOT MET**") == 1
    assert "Every bound below is met." not in text


def test_whole_models_stand_above_single_layers_and_their_absence_is_said() -> None:
    made = synthetic()
    text = report.text_of(made, None)
    assert text.index("## A whole model") < text.index("### Some-Llama: 135 million") < text.index("## One layer")
    assert "- decode, 8 rows: roadie +2.1%; PEFT LoRA r=8 +20.0%\n" in text
    assert "| 1.02: met " in text
    assert "No real model was measured" not in text
    made["entries"] = [entry for entry in made["entries"] if entry["workload"] != "checkpoint"]
    text = report.text_of(made, None)
    assert text.index("No real model was measured") < text.index("## One layer")
    assert list(by_line(made)) == [2, 3, 4, 5, 6, 7]


def test_the_time_of_whole_models_stands_beside_that_of_the_rest() -> None:
    text = report.text_of({**synthetic(), "whole_models_s": 600.0}, None)
    assert "14.0 minutes, and 10.0 for whole models" in text


def test_a_bound_is_met_where_the_interval_reaches_it() -> None:
    made = change(synthetic(), 0, "rivals", ROADIE, "ratio", value=as_interval((1.05, 1.02, 1.09)))
    assert all(all(met) for met in by_line(made).values())


def test_a_run_that_takes_too_long_and_cases_that_failed_are_said() -> None:
    made = {**synthetic(), "duration_s": 901.0, "failures": [{"task": "the case", "error": "ValueError: why"}]}
    assert by_line(made)[7] == [False]
    assert "the case failed: ValueError: why" in report.text_of(made, None)


def test_a_rival_that_is_faster_or_leaner_is_named_even_where_no_bound_speaks_of_it() -> None:
    assert losses(synthetic()) == []
    made = change(synthetic(), 0, "case", "tokens", value=1)
    made = change(made, 0, "rivals", PEFT_IA3, "ratio_to_roadie", value=as_interval((0.9, 0.8, 0.99)))
    made = change(made, 4, "bytes", f"{ROADIE} road_1", "per_element", value=4.0)
    made = change(made, 6, "bytes", PEFT_LORA, value=60)
    found = losses(made)
    assert [loss.rival for loss in found] == [PEFT_IA3, PEFT_LORA, PEFT_LORA]
    assert [loss.share for loss in found] == ["0.900 (0.800 to 0.990)", "0.625", "0.500"]
    assert "| time: forward, bf16, 1 tokens x 4096 " in report.text_of(made, None)


def test_an_inverted_interval() -> None:
    assert inverted(as_interval((2.0, 1.0, 4.0))) == {"value": 0.5, "low": 0.25, "high": 1.0}


def test_equal_records_give_equal_text_and_what_was_written_gives_the_same(tmp_path: Path) -> None:
    made = record.rounded(synthetic())
    path = record.write(made, tmp_path / "record.json")
    assert report.text_of(record.read(path), None) == report.text_of(made, None)


def test_the_text_names_machine_commit_versions_threads_and_rivals() -> None:
    text = report.text_of(synthetic(), None)
    for words in ("Some CPU", "abc", "torch 2.13.0", "40.0 GB/s (1 threads)", "0.1 0.2 0.3", "14.0 minutes", *RIVALS):
        assert words in text, words
    assert "162 million parameters" in text


def test_the_newest_record_of_a_kind_counts_and_other_files_do_not(tmp_path: Path) -> None:
    for date, name in (("2026-01-01T00:00:00Z", "one"), ("2026-01-02T00:00:00Z", "two")):
        record.write({**synthetic(), "date": date}, tmp_path / "machine" / f"{name}.json")
    (tmp_path / "machine" / "merging.json").write_text('{"what": "another benchmark"}')
    assert record.newest(record.CPU, tmp_path)["date"] == "2026-01-02T00:00:00Z"
    assert record.newest(record.GPU, tmp_path) is None


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = record.write({**synthetic(), "schema": 0}, tmp_path / "record.json")
    with pytest.raises(ValueError, match="schema 0"):
        record.read(path)


def test_quick_records_stay_out_of_the_results() -> None:
    made = synthetic()
    assert record.path_of(made) == record.RESULTS / "some-cpu-2-cores" / "2026-01-02-abc.json"
    assert record.RESULTS not in record.path_of({**made, "quick": True}).parents


def test_the_machine_is_called_after_its_processor() -> None:
    assert slug("AMD EPYC(tm) 9B45") == "amd-epyc-tm-9b45"
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cores", machine_name())


def test_a_task_that_raises_is_recorded_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> list[dict[str, Any]]:
        raise ValueError("why")

    tasks = [plan.Task("one", fail), next(plan._layers(64, 1, Budget(0, 2, 2)))]
    made = run.measure_all(tasks, quick=True)
    assert made["failures"] == [{"task": "one", "error": "ValueError: why"}]
    assert len(made["entries"]) == 1
    assert {"limit_ms", "rivals"} <= set(made["entries"][0])
    assert "ValueError: why" in capsys.readouterr().err


def test_what_has_not_begun_when_the_time_is_over_is_left_out_and_said() -> None:
    made = run.measure_all([plan.Task("too late", list)], quick=True, deadline_s=-1)
    assert made["left_out"] == ["too late"]
    assert made["entries"] == made["failures"] == []
    assert "- too late: left out" in report.text_of({**synthetic(), "left_out": ["too late"]}, None)


def test_plots_are_drawn_of_whatever_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install roadie[bench]")
    path = report.write(synthetic(), None, tmp_path)
    assert path == tmp_path / "performance.md"
    images = {image.name for image in (tmp_path / "images").iterdir()}
    assert images == {f"performance-{what}.png" for what in ("checkpoint", "layer", "roofline", "model")}
    assert images == set(re.findall(r"\]\(images/([^)]+)\)", path.read_text(encoding="utf-8")))
