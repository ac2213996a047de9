"""Jobs that rotate the inputs of layers too, trained together with others: each is what it would be alone."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.gradients import collect_gradients
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint
from roadie.adapter import INPUT_SUFFIX
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.kernels import Keep
from roadie.rotation import Variant, chain_from_parameters, rotate
from roadie.training.many import JobStatus, train_many

together = runpy.run_path(str(Path(__file__).with_name("test_together.py")))
STAGES = ((None, [64]), (None, None), ([2, 16], [8, 2]), (None, [64]))


@pytest.mark.filterwarnings("ignore:this adapter")
def test_jobs_with_and_without_inputs_are_runs_of_their_own(some_jobs, tiny_path):
    changes = {"variant": "road_1", "targets": ["q_proj", "down_proj"], "group_size": 64, "steps": 6}
    jobs = [
        {**job, "stages": stages, "input_stages": of_input}
        for job, (stages, of_input) in zip(some_jobs(4, **changes), STAGES, strict=True)
    ]
    result = train_many(jobs, model=str(tiny_path))
    assert [job.status for job in result.jobs] == [JobStatus.FINISHED] * 4
    for job in jobs:
        expected, tensors = together["alone"](job, tiny_path)
        together["assert_same_losses"](together["losses"](result, job["name"]), expected)
        adapter = checkpoint.load(job["output"])
        assert adapter.input_stages == ((tuple(job["input_stages"]),) if job["input_stages"] else ())
        for path, layer in adapter.layers.items():
            name = f"base_model.model.{path}.road_theta.default"
            assert torch.allclose(layer.theta, tensors[name], atol=2e-3 * job["learning_rate"] * job["steps"]), name
        assert len(adapter.layers) == len(tensors) // 2
        assert adapter.config["target_modules"] == ["down_proj", "q_proj"]
        assert not adapter.config.get("adapt_group_size")
        assert roadie.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), job["output"])


SITES = {"up": 16, "gate": 16, "up.road_input": 8, "gate.road_input": 8}
KINDS = {"both": tuple(SITES), "plain": ("up", "gate"), "input": ("gate.road_input",)}
ROWS = ["both", None, "input", "plain", "both", "input"]
At = Callable[[str, Tensor], Tensor]
Places = dict[tuple[str, str], tuple[Tensor, Tensor]]


def stages(path: str) -> tuple[int, ...]:
    return (8, 2) if path == "up.road_input" else (8,)


def a_bank(keep: Keep | None) -> TrainableBank:
    bank = TrainableBank(torch.device("cpu"), keep)
    bank.join(
        {n: [AdaptedLayer(path, SITES[path], Variant.ROAD_1, stages(path)) for path in of] for n, of in KINDS.items()}
    )
    for family in bank.families:
        for stack in family.stacks:
            stack.parameters.add_(0.3 * torch.randn(stack.parameters.shape))
    return bank


def places(bank: TrainableBank) -> Places:
    """Parameters and gradients ``[2, n]`` of each adapter at each site."""
    return {
        (family.names[0], path): (stack.parameters[number, :, 0], stack.gradients[number, :, 0])
        for family in bank.families
        for stack in family.stacks
        for number, path in enumerate(stack.paths)
    }


def one_by_one(model: nn.ModuleDict, leaves: dict[tuple[str, str], Tensor]) -> At:
    """Each row by itself, differentiable in the leaves ``[2, n]``."""

    def turned(path: str, y: Tensor, name: str | None) -> Tensor:
        if name is None or (name, path) not in leaves:
            return y
        return rotate(y, *chain_from_parameters(*leaves[name, path], "road_1", stages(path)))

    def at(path: str, y: Tensor) -> Tensor:
        rows = zip(y, ROWS, strict=True)
        return torch.stack(
            [turned(path, model[path](turned(f"{path}{INPUT_SUFFIX}", row, name)), name) for row, name in rows]
        )

    return at


def loss_of(at: At, x: Tensor) -> Tensor:
    """Two layers that are given one tensor."""
    return (at("up", x).tanh() * at("gate", x)).square().sum()


@pytest.mark.parametrize("keep", [None, Keep.INPUT])
def test_gradients_are_those_of_autograd(keep: Keep | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(8, 16), "gate": nn.Linear(8, 16)}).requires_grad_(False)
    bank, x = a_bank(keep), torch.randn(len(ROWS), 3, 8, requires_grad=True)
    given = x.detach().clone()
    leaves = {key: parameters.clone().requires_grad_() for key, (parameters, _) in places(bank).items()}
    expected = loss_of(one_by_one(model, leaves), x)
    *wanted, of_x = torch.autograd.grad(expected, [*leaves.values(), x])

    bank.make_tables()
    slots = torch.tensor([bank.names.index(name) if name else -1 for name in ROWS])
    kept: list[int] = []
    with bank.attached(model, list(SITES)), bank.routed(slots):
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.data_ptr()) or y, lambda y: y):
            loss = loss_of(lambda path, y: model[path](y), x)
        loss.backward()
    assert kept.count(x.data_ptr()) == 2  # what both layers are given, and nothing of their own
    collect_gradients(bank)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, of_x)
    for gradient, (_, found) in zip(wanted, places(bank).values(), strict=True):
        torch.testing.assert_close(found, gradient)
    assert torch.equal(x.detach(), given)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.values())
