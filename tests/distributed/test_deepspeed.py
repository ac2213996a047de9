"""ZeRO-3 on two processes, where DeepSpeed is installed (make test-deepspeed): losses, gradients, files, resuming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.patience import HANG_S

from roadie import checkpoint
from roadie.testing.accuracy import relative_error, unit_roundoff

pytest.importorskip("deepspeed")

FOLDER = Path(__file__).parent
VARIANTS = ("road_1", "road_2", "road_4")
WAYS = ("whole", "parts")

# Everything is in float32. A gradient sums over 48 tokens, of products that end chains of 2 x 14 layers of at most 64 inputs:
# two orders of summation of so many terms differ by at most this share of the sum of their sizes.
ORDER_OF_SUMMATION = (48 + 2 * 14 * 64) * unit_roundoff(torch.float32)
# AdamW divides by at least its epsilon what a gradient near zero differs by; these are shares of rate x steps.
OF_PARAMETERS = 4 * 1e-2 * 2.0**-7


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command += [str(FOLDER / "program_zero3.py"), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert ended.returncode == 0, ended.stderr
    subprocess.run([sys.executable, FOLDER / "program_stock.py", folder], check=True, timeout=HANG_S)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_gradients_and_a_resumed_adapter_are_those_of_one_process(way: str, variant: str, done: Path) -> None:
    wanted, truth = torch.load(done / f"one-{variant}-0.pt"), torch.load(done / f"truth-{variant}-0.pt")
    for rank in range(2):
        found = torch.load(done / f"{way}-{variant}-{rank}.pt")
        assert found["losses"] == pytest.approx(wanted["losses"], rel=ORDER_OF_SUMMATION)
        for name, tensor in truth["gradients"].items():
            assert relative_error(found["gradients"][name], tensor) <= ORDER_OF_SUMMATION, name
        for name, tensor in wanted["parameters"].items():
            assert torch.allclose(found["parameters"][name], tensor, rtol=0, atol=OF_PARAMETERS), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_saved_adapters_load_in_stock_peft(way: str, variant: str, done: Path) -> None:
    adapter = checkpoint.load(done / f"adapter-{way}-{variant}")
    parameters = torch.load(done / f"{way}-{variant}-0.pt")["parameters"]
    for path, layer in adapter.layers.items():
        assert torch.equal(layer.theta, parameters[f"base_model.model.{path}.road_theta.default"])
    found, wanted = torch.load(done / f"stock-adapter-{way}-{variant}.pt"), torch.load(done / f"logits-{variant}.pt")
    assert relative_error(found, wanted) <= ORDER_OF_SUMMATION


def test_an_adapter_is_not_loaded_behind_the_optimizer(done: Path) -> None:
    assert "load the adapter before deepspeed.initialize" in (done / "refused-0").read_text()


def test_the_example_runs_as_it_stands(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command.append(str(root / "examples" / "distributed" / "zero3.py"))
    subprocess.run(command, check=True, timeout=HANG_S, env=environment, cwd=tmp_path, capture_output=True)
    assert all(layer.theta.any() for layer in checkpoint.load(tmp_path / "zero3-adapter").layers.values())
