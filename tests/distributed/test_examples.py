"""The examples run on two processes as they stand, and leave adapters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.versions import OLD_TRANSFORMERS

import roadie
from roadie import checkpoint

pytestmark = pytest.mark.skipif(
    OLD_TRANSFORMERS,
    reason="torch 2.6's FSDP2 has no ignored_params, and the parallel layers of transformers 5.0 are no DTensors",
)


@pytest.mark.slow
@pytest.mark.long
def test_examples(tmp_path: Path, launch) -> None:
    done = launch(Path(__file__).parent / "program_examples.py", tmp_path)
    said = [line for line in done.stdout.splitlines() if "loss" in line]
    first, again, parallel, trainer = (re.sub(r"\d+\.\d+", "x", line) for line in said if not line.startswith("{"))
    assert (first, again) == ("steps 0 to 10, loss x", "steps 10 to 20, loss x")
    assert (parallel, trainer) == ("loss x", "loss x on 2 processes")
    losses = [float(re.search(r"loss (\d+\.\d+)", line).group(1)) for line in said if not line.startswith("{")]
    assert losses[1] < losses[0]
    for name in ("fsdp-adapter", "tensor-parallel-adapter", "trainer-output/adapter"):
        adapter = checkpoint.load(tmp_path / name)
        assert adapter.num_parameters == 10_752
        assert all(layer.theta.any() for layer in adapter.layers.values())
        roadie.PeftModel.from_pretrained(roadie.embedded.load_model(), tmp_path / name)
