"""The GPU's benchmark, the same code at toy sizes on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import gpu, record, tables
from benchmarks.rivals import FROZEN, PEFT_LORA, PEFT_ROAD, RIVALS, ROADIE
from benchmarks.workloads.decoding import CAN_STEP_BACK

pytest.importorskip("matplotlib", reason="the figure needs matplotlib: pip install roadie[bench]")


can_step_back = pytest.mark.skipif(not CAN_STEP_BACK, reason="decoding needs a newer transformers")


@can_step_back
def test_one_command_makes_the_record_and_the_figure(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--layers", "1", "--output", str(path)]) == 0
    made = record.read(path)
    assert made["failures"] == []
    assert made["kind"] == record.GPU
    assert made["quick"]
    assert {entry["workload"] for entry in made["entries"]} == {"layer", "model", "adapters", "graphs"}
    by_adapters = [entry for entry in made["entries"] if entry["workload"] == "adapters"]
    assert [entry["case"]["adapters"] for entry in by_adapters] == [1, 2, 4]
    assert set(by_adapters[0]["rivals"]) == {FROZEN, ROADIE, PEFT_ROAD, PEFT_LORA, "LoRA r=8 by bmm"}
    assert all(set(entry["rivals"]) == set(RIVALS) for entry in made["entries"] if entry["workload"] == "model")
    assert (tmp_path / "record-adapters.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(tables.gpu(made))
    assert "adapters" in text
    assert "graph" in text
