"""What stock PEFT's RoAd does well, and what we must therefore do too: the same checks pass on both."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tests.versions import needs_a_compiler_of_whole_models
from torch import nn
from torch._dynamo.testing import CompileCounter

import roadie
from roadie.testing import tiny_llama

SETTINGS = {"target_modules": ["up", "down"], "group_size": 8}
NAMES = ["first", "second"]
VARIANTS = ["road_1", "road_2", "road_4"]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


def _model(implementation: Any, variant: str = "road_1") -> Any:
    torch.manual_seed(0)
    return implementation.adapt_many(_Net(), NAMES, variant=variant, **SETTINGS)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (2, 0, 16)], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
def test_no_rows(both: Any, shape: tuple[int, ...], mixed: bool) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation)
        arguments = {"adapter_names": ["second"] * shape[0]} if mixed else {}
        result = model(_x(*shape), **arguments)
        assert result.shape == shape
        assert result.dtype == torch.float32

    with torch.no_grad():
        both(check)


def test_no_rows_in_training(both: Any) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation).train()
        model(_x(0, 16)).sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if ".road_" in name and p.requires_grad]
        assert len(grads) == 4
        assert all(grad is not None and not grad.any() for grad in grads)

    both(check)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_dimensional_input(both: Any, variant: str) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation, variant)
        result = model(_x(3, 16)[1])
        assert result.shape == (16,)
        torch.testing.assert_close(result, model(_x(3, 16))[1])

    with torch.no_grad():
        both(check)


@pytest.mark.parametrize("variant", VARIANTS)
def test_non_contiguous_input_and_base_output(both: Any, variant: str) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation, variant)
        x = _x(16, 5, 4).permute(2, 1, 0)
        assert not x.is_contiguous()
        for arguments in ({}, {"adapter_names": ["second", "first", "__base__", "second"]}):
            torch.testing.assert_close(model(x, **arguments), model(x.contiguous(), **arguments))

    with torch.no_grad():
        both(check)


class _Transposing(nn.Linear):
    """A linear layer whose output is a transposed view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)


def test_a_base_layer_whose_output_is_not_contiguous(both: Any) -> None:
    def check(implementation: Any) -> None:
        torch.manual_seed(0)
        odd = _Transposing(16, 32)
        plain = nn.Linear(16, 32)
        plain.load_state_dict(odd.state_dict())
        settings = {"target_modules": ["0"], "group_size": 8}
        one, other = (implementation.adapt_many(nn.Sequential(base), NAMES, **settings) for base in (odd, plain))
        assert not odd(_x(3, 5, 16)).is_contiguous()
        torch.testing.assert_close(one(_x(3, 5, 16)), other(_x(3, 5, 16)))

    with torch.no_grad():
        both(check)


class _Echo(nn.Linear):
    """A layer that gives back its own input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_plain_batch_leaves_the_input_of_a_layer_that_returns_it(both: Any) -> None:
    def check(implementation: Any) -> None:
        settings = {"target_modules": ["0"], "group_size": 8}
        model = implementation.adapt_many(nn.Sequential(_Echo(16, 16)), NAMES, **settings)
        x = _x(3, 16)
        assert not torch.equal(model(x), x)
        assert torch.equal(x, _x(3, 16))

    with torch.no_grad():
        both(check)


def _copied(model: Any, way: str) -> Any:
    model(_x(4, 16))  # whatever a forward keeps must not be in the way
    return copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(both: Any, way: str, merged: bool) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation)
        x, rows = _x(4, 16), ["second", "first", "__base__", "second"]
        mixed, unmerged = model(x, adapter_names=rows), model(x)
        if merged:
            model.merge_adapter()
        wanted = model(x)
        other = implementation.checked(_copied(model, way))
        assert torch.equal(other(x), wanted)
        mine = {parameter.data_ptr() for parameter in model.parameters()}
        assert not mine & {parameter.data_ptr() for parameter in other.parameters()}
        if merged:
            other.unmerge_adapter()
            torch.testing.assert_close(other(x), unmerged)
        torch.testing.assert_close(other(x, adapter_names=rows), mixed)
        other.set_adapter("second")
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(model(x), wanted)

    with torch.no_grad():
        both(check)


def test_a_copy_in_the_middle_of_a_mixed_batch_is_a_plain_model(ours: Any) -> None:
    model = _model(ours)
    x = _x(4, 16)
    with torch.no_grad():
        plain = model(x)
        with roadie.rows(model, ["second"] * 4):
            other = copy.deepcopy(model)
            assert not torch.equal(model(x), plain)
        assert torch.equal(other(x), plain)
        with roadie.rows(other, ["second"] * 4):
            assert torch.equal(model(x), plain), "the copy shares the choice of rows"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
@needs_a_compiler_of_whole_models
def test_compiles_to_one_full_graph(both: Any, variant: str, training: bool) -> None:
    def check(implementation: Any) -> None:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = _model(implementation, variant).train(training)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        torch.testing.assert_close(compiled(_x(4, 16)), model(_x(4, 16)))
        compiled(_x(4, 16) + 1)
        assert counter.frame_count == 1

    both(check)


@needs_a_compiler_of_whole_models
def test_new_values_are_swapped_into_a_compiled_model_without_another_program(both: Any) -> None:
    def check(implementation: Any) -> None:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = _model(implementation)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        x = _x(4, 16)
        before = compiled(x)
        new = {name: value * 0.5 for name, value in get_peft_model_state_dict(model, adapter_name="first").items()}
        set_peft_model_state_dict(model, new, adapter_name="first")
        after = compiled(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, model(x))
        assert counter.frame_count == 1

    with torch.no_grad():
        both(check)


@pytest.mark.parametrize(("variant", "strict"), [("road_1", False), ("road_2", True), ("road_4", False)])
@needs_a_compiler_of_whole_models
def test_exports(both: Any, variant: str, strict: bool) -> None:
    def check(implementation: Any) -> None:
        model = _model(implementation, variant)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model(_x(4, 16))  # a forward before must not leave constants in the program
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(model.base_model.model, (_x(4, 16),), dynamic_shapes=({0: rows},), strict=strict)
        for batch in (4, 7):
            torch.testing.assert_close(program.module()(_x(batch, 16)), model(_x(batch, 16)))
        stored = [name for name in program.state_dict if ".road_" in name]
        assert len(stored) == 8, "an adapter's values are not in the program's state"

    both(check)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage(both: Any, tmp_path: Any, low_cpu_mem_usage: bool) -> None:
    def check(implementation: Any) -> None:
        folder = tmp_path / implementation.name
        llama = {"target_modules": ["q_proj", "down_proj"], "group_size": 16}
        model = implementation.adapt_many(tiny_llama(), NAMES, **llama)
        model.save_pretrained(folder)
        ids = torch.arange(8).reshape(2, 4)
        loaded = implementation.load(
            tiny_llama(), folder / "first", adapter_name="first", low_cpu_mem_usage=low_cpu_mem_usage
        )
        loaded.load_adapter(folder / "second", adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.eval()
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        for name in NAMES:
            model.set_adapter(name)
            loaded.set_adapter(name)
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        rows = ["second", "__base__"]
        assert torch.equal(loaded(ids, adapter_names=rows).logits, model(ids, adapter_names=rows).logits)

    with torch.no_grad():
        both(check)


def test_low_cpu_mem_usage_of_get_peft_model(both: Any) -> None:
    def check(implementation: Any) -> None:
        model = peft.get_peft_model(_Net(), implementation.config(**SETTINGS), low_cpu_mem_usage=True)
        implementation.checked(model)
        road = [parameter for name, parameter in model.named_parameters() if ".road_" in name]
        assert len(road) == 4
        assert all(parameter.is_meta for parameter in road)

    both(check)
