"""What rotations in a row cost: the report says where a bound is not met, and the benchmark measures what its names say."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from benchmarks import capacity, capacity_report
from benchmarks.bank_report import newest
from benchmarks.workloads.model import ModelSize, llama


def test_a_figure_above_its_bound_is_called_so(tmp_path: Path) -> None:
    def found(value: float) -> dict[str, object]:
        ratio = {"value": value, "low": value, "high": value}
        return {"median_ms": 10 * value, "q1_ms": 1.0, "q3_ms": 2.0, "ratio": ratio}

    options = {
        "base": found(0.99),
        "64": found(1.0),
        "2, 64": found(1.01),
        "2, 16, 64": found(1.03),
        "PEFT LoRA r=8": found(2),
    }
    entry = {"what": "decode", "case": {"mode": "decode"}, "rounds": 5, "over_single": options, "over_base": options}
    (tmp_path / "a.json").write_text(json.dumps({"commit": "c", "date": "d", "machine": "m", "entries": [entry]}))
    lines = capacity_report.text_of(newest([tmp_path / "a.json"])).splitlines()
    verdicts = {cells[2].strip(): cells[6].strip() for line in lines if len(cells := line.split("|")) == 9}
    assert verdicts["2, 64"] == "met"
    assert verdicts["2, 16, 64"] == "NOT met"
    assert verdicts["64"] == verdicts["base"] == verdicts["PEFT LoRA r=8"] == ""


def test_all_that_is_compared_rotates_as_its_name_says() -> None:
    size = ModelSize(hidden=64, layers=1, heads=2, intermediate=128, vocabulary=50)
    base = llama(size, torch.float32)
    for stages in capacity.OPTIONS.values():
        adapter = capacity.random_adapter(base, 0, stages)
        assert adapter.stages == (stages,)
        assert len(adapter.layers) == 7
        assert all(float(layer.theta.abs().max()) > 0 for layer in adapter.layers.values())
    chain = capacity.random_chain(3, (2, 64), torch.bfloat16)
    assert [table.group_sizes for table in chain] == [2, 64]
