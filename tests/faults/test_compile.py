"""Faults of stock PEFT under torch.compile: a new program for each assignment of adapters to rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.versions import needs_a_compiler_of_whole_models
from torch import nn
from torch._dynamo.testing import CompileCounter

import roadie
from roadie.testing import tiny_llama

NAMES = ["first", "second", "third"]
LLAMA = {"target_modules": ["q_proj", "down_proj"], "group_size": 16}
PROMPTS = torch.arange(4 * 5).reshape(4, 5) * 7 % 128
NET = {"target_modules": ["up", "down"], "group_size": 8}
X = torch.linspace(-1, 1, 4 * 5 * 16).reshape(4, 5, 16)
ASSIGNMENTS = 20


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # A limit above the number of assignments: recompilations are counted, none is refused.
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    with torch._dynamo.config.patch({name: 10 * ASSIGNMENTS}):
        yield
    torch._dynamo.reset()


def _assignments() -> list[list[str]]:
    """Twenty different lists of adapters for four rows, in a fixed order; also different sets of adapters."""
    choices = [[a, b, c, d] for a in [*NAMES, "__base__"] for b in NAMES for c in NAMES for d in [*NAMES, "__base__"]]
    return random.Random(0).sample(choices, ASSIGNMENTS)


def _slots(rows: list[str]) -> torch.Tensor:
    return torch.tensor([NAMES.index(name) if name in NAMES else -1 for name in rows])


class _Net(nn.Module):
    # Not an nn.Sequential: torch would compile each of its layers into a program of its own.
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


def _net(implementation: Any) -> Any:
    torch.manual_seed(0)
    return implementation.adapt_many(_Net(), NAMES, **NET)


def _compile_inside(model: Any, counter: CompileCounter, way: str) -> Any:
    """Compiles the model inside a PeftModel into one graph, in one of the two ways torch has."""
    tuner = model.base_model
    if way == "torch.compile(module)":
        tuner.model = torch.compile(tuner.model, fullgraph=True, backend=counter)
    else:
        tuner.model.compile(fullgraph=True, backend=counter)
    return model


@needs_a_compiler_of_whole_models
def test_twenty_lists_of_adapter_names_are_one_program_of_a_language_model(fault: Any) -> None:
    def check(implementation: Any) -> None:
        counter = CompileCounter()
        plain, model = (implementation.adapt_many(tiny_llama(num_hidden_layers=1), NAMES, **LLAMA) for _ in range(2))
        _compile_inside(model, counter, "module.compile()")
        for rows in _assignments():
            wanted = plain(PROMPTS, adapter_names=rows).logits
            torch.testing.assert_close(model(PROMPTS, adapter_names=rows).logits, wanted)
            assert counter.frame_count == 1, "another list made another program"

    with torch.no_grad():
        fault(check, match="another list made another program")


@pytest.mark.parametrize("way", ["torch.compile(module)", "module.compile()"])
def test_twenty_lists_of_adapter_names_are_one_program(fault: Any, way: str) -> None:
    def check(implementation: Any) -> None:
        counter = CompileCounter()
        plain, model = _net(implementation), _compile_inside(_net(implementation), counter, way)
        for rows in _assignments():
            torch.testing.assert_close(model(X, adapter_names=rows), plain(X, adapter_names=rows))
            assert counter.frame_count == 1, "another list made another program"

    with torch.no_grad():
        fault(check, match="another list made another program")


@pytest.mark.parametrize("around", ["the PeftModel", "the compiled model"])
@pytest.mark.parametrize("given_as", ["slots", "names"])
def test_twenty_choices_of_rows_are_one_program(ours: Any, given_as: str, around: str) -> None:
    counter = CompileCounter()
    model = _net(ours)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
    routed = model if around == "the PeftModel" else compiled
    with torch.no_grad():
        for rows in _assignments():
            wanted = model(X, adapter_names=rows)
            with roadie.rows(routed, rows if given_as == "names" else _slots(rows)):
                torch.testing.assert_close(compiled(X), wanted)
            assert counter.frame_count == 1, "another choice made another program"


def test_twenty_choices_of_rows_are_one_program_in_training(ours: Any) -> None:
    counter = CompileCounter()
    model = _net(ours).train()
    road = [parameter for name, parameter in model.named_parameters() if ".road_" in name]
    for parameter in road:
        parameter.requires_grad_(True)
    eager = model.base_model.model
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for rows in _assignments():
        with roadie.rows(model, _slots(rows)):
            losses = [module(X).square().mean() for module in (compiled, eager)]
        got, wanted = (torch.autograd.grad(loss, road) for loss in losses)
        torch.testing.assert_close(got, wanted)
        assert counter.frame_count == 1, "another choice made another program"


def test_twenty_choices_for_each_token_are_one_program(ours: Any) -> None:
    counter = CompileCounter()
    model = _net(ours)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(ASSIGNMENTS):
            slots = torch.randint(-1, len(NAMES), X.shape[:2], generator=generator)
            with roadie.rows(model, slots):
                torch.testing.assert_close(compiled(X), model.base_model.model(X))
            assert counter.frame_count == 1, "another choice made another program"
