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
        "64 + input 64": found(1.04),
        "PEFT LoRA r=8": found(2),
    }
    measured = {"over_single": options, "over_base": options, "copy_bytes_per_s": 1e10}
    measured |= {"table_bytes": {"64": 10**6, "2, 64": 2 * 10**6, "2, 16, 64": 3 * 10**6, "64 + input 64": 15 * 10**5}}
    entries = [{"what": mode, "case": {"mode": mode}, "rounds": 5, **measured} for mode in ("decode", "prefill")]
    (tmp_path / "a.json").write_text(json.dumps({"commit": "c", "date": "d", "machine": "m", "entries": entries}))
    text = capacity_report.text_of(newest([tmp_path / "a.json"]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    verdicts = {row[1]: row[7] for row in rows if row[0] == "decode"}
    assert verdicts["2, 64"] == "1.02 met"
    assert verdicts["2, 16, 64"] == "1.02 NOT met"
    assert verdicts["64 + input 64"] == "1.05 met"
    assert verdicts["64"] == verdicts["base"] == verdicts["PEFT LoRA r=8"] == ""
    assert all(row[7] == "" for row in rows if row[0] == "prefill")
    limits = {row[1]: row[6] for row in rows if row[0] == "decode"}
    assert (limits["64"], limits["2, 64"]) == ("1.000", "1.010")  # 1 MB at 10 GB/s: 0.1 ms of 10
    assert "Not within its bound: 2, 16, 64." in text


def test_all_that_is_compared_rotates_as_its_name_says() -> None:
    size = ModelSize(hidden=64, layers=1, heads=2, intermediate=128, vocabulary=50)
    base = llama(size, torch.float32)
    for option in capacity.OPTIONS.values():
        adapter = capacity.random_adapter(base, 0, option)
        assert adapter.stages == (option.stages,)
        assert adapter.input_stages == ((option.input_stages,) if option.input_stages else ())
        assert len(adapter.layers) == (14 if option.input_stages else 7)
        assert all(float(layer.theta.abs().max()) > 0 for layer in adapter.layers.values())
    chain = capacity.random_chain(3, (2, 64), torch.bfloat16)
    assert [table.group_sizes for table in chain] == [2, 64]


def test_a_site_rotates_what_it_is_given_or_makes_something_new() -> None:
    slots, x = torch.tensor([1, 0, 2]), torch.randn(3, 2, capacity.WIDTH)
    chain = capacity.random_chain(3, (64,), torch.float32)
    site, none, given = capacity.Site(chain, slots, x), capacity.Site((), slots, x), x.clone()
    y = site.rotated(x)
    assert torch.equal(x, given)
    site.rotate_(x)
    assert torch.equal(x, y)
    assert not torch.equal(x, given)
    none.rotate_(x)
    assert none.rotated(x) is x
    assert torch.equal(x, y)
