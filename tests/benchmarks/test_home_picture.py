"""The picture of the first page shows the newest record's figures, and what the page says of it is true."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import home_picture
from benchmarks.rivals import PEFT_LORA, PEFT_ROAD, ROADIE

HOME = (home_picture.machine.ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def entry(rows: int, adapters: int, roadie: float, **case: object) -> dict:
    given = {"mode": "decode", "threads": 1, "rows": rows, "adapters": adapters, **case}
    ratios = {ROADIE: roadie, PEFT_LORA: 2 * roadie, PEFT_ROAD: 3 * roadie}
    return {"model": "SmolLM2", "case": given, "rivals": {name: {"ratio": {"value": x}} for name, x in ratios.items()}}


def test_a_point_is_a_step_whose_rows_have_an_adapter_each(tmp_path: Path) -> None:
    others = [entry(8, 1, 5.0), entry(8, 32, 5.0, threads=2), entry(8, 32, 5.0, mode="training step")]
    record = {"entries": [entry(1, 1, 1.0), entry(32, 32, 1.5), *others]}
    (tmp_path / "2026-01-01-old.json").write_text(json.dumps({"entries": [entry(1, 1, 9.0)]}), encoding="utf-8")
    (tmp_path / "2026-01-02-new.json").write_text(json.dumps(record), encoding="utf-8")
    found = home_picture.steps(tmp_path)
    assert found == {ROADIE: {1: 1.0, 32: 1.5}, PEFT_LORA: {1: 2.0, 32: 3.0}, PEFT_ROAD: {1: 3.0, 32: 4.5}}


def test_the_page_says_what_the_picture_shows() -> None:
    steps, (tenants, lora) = home_picture.steps(), home_picture.batched_lora()
    assert max(steps[ROADIE].values()) < 1.07
    assert min(steps[PEFT_LORA][tenants], steps[PEFT_ROAD][tenants]) > 3
    memory = {method: sizes[0] * 1000 for method, sizes in home_picture.memory().items()}
    ratio = memory[PEFT_LORA] / memory[ROADIE]
    for said in (
        "1.07",
        f"{lora:.2f}",
        f"{memory[ROADIE]:.1f} MB",
        f"{memory[PEFT_LORA]:.0f} MB",
        f"{ratio:.1f} times",
    ):
        assert said in HOME


def test_it_is_drawn(tmp_path: Path) -> None:
    home_picture.draw(tmp_path / "tenants.svg")
    drawn = (tmp_path / "tenants.svg").read_text(encoding="utf-8")
    assert all(label in drawn for label in ("roadie (RoAd)", PEFT_LORA, PEFT_ROAD, "LoRA r=8, batched products"))
