"""Faults of stock PEFT in what a forward and a merge cost, counted in operations and shapes, never in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, OUT, GROUP = 8, 64, 16
ROWS = 16


class _Watch(TorchDispatchMode):
    """Counts the operations that reach the backend, and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name] += 1
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@contextmanager
def _watched() -> Iterator[_Watch]:
    with _Watch() as watch:
        yield watch


def _layer(bias: bool = True, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, OUT, bias=bias, dtype=dtype))


def _operations(implementation: Any, adapters: int, calls: int) -> int:
    """Tensor operations of the last of `calls` forwards of one layer, 16 rows that use `adapters` adapters."""
    names = [f"adapter_{index}" for index in range(adapters)]
    model = implementation.adapt_many(_layer(), names, target_modules=["0"], group_size=GROUP)
    rows = [names[row % adapters] for row in range(ROWS)]
    x = torch.randn(ROWS, WIDTH)
    for _ in range(calls):
        with _watched() as watch:
            model(x, adapter_names=rows)
    return sum(watch.calls.values())


@pytest.mark.parametrize("calls", [1, 2], ids=["first call", "second call"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_mixed_batch_takes_as_many_operations_for_16_adapters_as_for_2(fault: Any, grad: bool, calls: int) -> None:
    def check(implementation: Any) -> None:
        with torch.set_grad_enabled(grad):
            operations = {adapters: _operations(implementation, adapters, calls) for adapters in (2, 4, 8, 16)}
        assert len(set(operations.values())) == 1, f"operations grow with the adapters: {operations}"

    fault(check, match="operations grow with the adapters")


@pytest.mark.parametrize("rows", [None, ["default", "__base__"]], ids=["plain", "mixed"])
def test_cos_and_sin_are_not_computed_again_while_the_parameters_stay(fault: Any, rows: list[str] | None) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_layer(), ["default"], target_modules=["0"], group_size=GROUP)
        arguments = {"adapter_names": rows} if rows else {}
        x = torch.randn(2, WIDTH)
        first = model(x, **arguments)
        with _watched() as watch:
            again = model(x, **arguments)
        assert torch.equal(again, first)
        assert not watch.calls["aten::cos"] + watch.calls["aten::sin"], "cos and sin were computed again"
        with torch.no_grad():  # and what is kept is given up when the parameters change
            for name, parameter in model.named_parameters():
                if ".road_theta" in name:
                    parameter.add_(0.5)
        assert not torch.equal(model(x, **arguments)[0], first[0])

    with torch.no_grad():
        fault(check, match="cos and sin were computed again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_builds_no_matrix_of_outputs_by_outputs(fault: Any, safe_merge: bool, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = _adapted(implementation, dtype)
        with _watched() as watch:
            model.merge_adapter(safe_merge=safe_merge)
        assert watch.largest <= 2 * OUT * WIDTH, f"merge made a tensor of {watch.largest} elements"

    fault(check, match=f"merge made a tensor of {OUT * OUT} elements")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_inverts_no_matrix_of_outputs_by_outputs(fault: Any, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = _adapted(implementation, dtype)
        model.merge_adapter()
        with _watched() as watch:
            model.unmerge_adapter()
        assert not any("inv" in name for name in watch.calls), "unmerge inverts numerically"
        assert watch.largest <= 2 * OUT * WIDTH, f"unmerge made a tensor of {watch.largest} elements"

    fault(check, match="unmerge inverts numerically")


def _adapted(implementation: Any, dtype: torch.dtype) -> Any:
    # Outputs far wider than inputs: a matrix [OUT, OUT] is then larger than anything merging needs.
    assert OUT > 4 * WIDTH
    return implementation.adapt_many(_layer(dtype=dtype), ["default"], target_modules=["0"], group_size=GROUP)
