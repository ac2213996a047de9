"""`train` on two processes is `train` on one: losses, gradients, adapter, record; and what goes wrong ends both."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.once import once
from tests.versions import needs_trainer_to_resume_on_several_cpus
from transformers.loss.loss_utils import LOSS_MAPPING

import roadie.training.run
from roadie.testing.accuracy import two_orders

pytestmark = needs_trainer_to_resume_on_several_cpus

FOLDER = Path(__file__).parent
TINY = runpy.run_path(str(FOLDER.parent / "training" / "tiny.py"))

# Everything is computed in float64, where two orders of summation of n terms differ by at most n 2^-53 of the sum of their
# sizes; n is below 2^17 here (tokens of a batch x the longest inner product x layers). AdamW divides what comes of it by
# at least its epsilon, 1e-8, so that parameters may differ by that share of the learning rate at each step.
ORDER_OF_SUMMATION = 2.0**-36
RATE, STEPS, EPSILON = 3e-2, 6, 1e-8
# The loss of a step is kept in float32 by Trainer: added up over the micro-batches (2), and averaged over the processes (a sum
# and a quotient). Parameters that differ change it by the sum of |gradient| x difference over all of them, and what the division
# by |gradient| + epsilon makes of a difference cancels there: a share of the rate a step of each, with gradients below 1.
NUM_PARAMETERS = 2 * 2 * (4 * 64 + 2 * 128 + 64)
OF_LOSSES = two_orders(4, torch.float32) + NUM_PARAMETERS * STEPS * RATE * ORDER_OF_SUMMATION


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["build"](tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 records of many lengths, so that means over examples, batches and tokens all differ."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    records = [{"prompt": f"{n:02d} is ", "completion": "a number of turtles " * (1 + n % 4)} for n in range(23)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, base: Path, texts: Path) -> Path:
    """The folder of one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:  # of what the program sets
        patch.setattr(roadie.training.run, "training_dtype", None)
        patch.setitem(LOSS_MAPPING, "ForCausalLM", None)
        runpy.run_path(str(FOLDER / "program_train.py"))["main"](str(base), str(texts), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, base: Path, texts: Path, launch) -> Path:
    """The folder of two processes."""
    return once(tmp_path_factory, "two", lambda folder: launch(FOLDER / "program_train.py", base, texts, folder))


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def history(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in record(folder)["history"] if key in entry]


def test_gradients_are_those_of_the_global_batch(one: Path, two: Path) -> None:
    wanted = torch.load(one / "gradients-0.pt")
    assert len(wanted) == 28
    for rank in range(2):
        found = torch.load(two / f"gradients-{rank}.pt")
        assert found.keys() == wanted.keys()
        size = max(float(gradient.abs().max()) for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=0, atol=ORDER_OF_SUMMATION * size), name


@pytest.mark.parametrize("output", ["whole", "stopped"])
def test_losses_are_those_of_one_process(output: str, one: Path, two: Path) -> None:
    for key, count in (("loss", 6), ("eval_loss", 3)):
        wanted, found = history(one / "whole", key), history(two / output, key)
        assert len(wanted) == count
        assert found == pytest.approx(wanted, rel=OF_LOSSES), key
        assert wanted[-1] < wanted[0]


@pytest.mark.parametrize("output", ["whole", "stopped"])
def test_the_adapter_is_that_of_one_process(output: str, one: Path, two: Path) -> None:
    name = "adapter_model.safetensors"
    wanted, found = load_file(one / "whole" / name), load_file(two / output / name)
    assert found.keys() == wanted.keys()
    bound = STEPS * RATE * ORDER_OF_SUMMATION / EPSILON
    for key, tensor in wanted.items():
        assert torch.allclose(found[key].double(), tensor.double(), rtol=0, atol=bound), key


def test_the_record_is_that_of_one_process(one: Path, two: Path) -> None:
    wanted, found, resumed = (record(folder) for folder in (one / "whole", two / "whole", two / "stopped"))
    assert found["settings"] == wanted["settings"]
    for key in ("steps", "tokens", "train_examples", "evaluation_examples", "trainable_parameters", "best_step"):
        assert found["result"][key] == wanted["result"][key], key
    assert resumed["result"]["resumed_from_step"] == 4
    assert resumed["result"]["loss_after"] == pytest.approx(wanted["result"]["loss_after"], rel=OF_LOSSES)


def test_what_is_refused_is_refused_in_both(two: Path) -> None:
    messages = [(two / f"refused-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "whole: got a folder that is not empty" in messages[0]
    assert {path.name for path in two.iterdir()} == {
        *("whole", "stopped", "gradients-0.pt", "gradients-1.pt", "refused-0", "refused-1")
    }
