"""A layer rotates as it did the last time only while nobody looks on: no mode of torch, no derivative, no wish.

Legend: B rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import roadie
from roadie import AdapterBank
from roadie.kernels import choice, using
from roadie.testing import randomise

B, D = 4, 16
NAMES = ["b", "__base__", "default", "b"]


class Net(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).sin())
        return out


def _x() -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(2))


def _adapted() -> Any:
    config = roadie.RoadConfig(target_modules=["first", "second"], group_size=4)
    model = roadie.get_peft_model(Net(), config)
    model.add_adapter("b", config)
    return randomise(model, seed=1).requires_grad_(False)


def _plain() -> tuple[Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]]:
    return _adapted(), nullcontext


def _named() -> tuple[Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]]:
    model = _adapted()
    return lambda x: model(x, adapter_names=NAMES), nullcontext


def _in_a_bank() -> tuple[Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]]:
    model, adapted = Net(), _adapted()
    bank = AdapterBank(model, 2)
    for name in ("default", "b"):
        bank.admit(name, (adapted, name))
    return model, lambda: bank.rows(["b", None, "default", "b"])


def _in_forward_mode(run: Callable[[Tensor], Tensor], x: Tensor, towards: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(run(forward_ad.make_dual(x, towards))).tangent
    return tangent


def _by_transform(run: Callable[[Tensor], Tensor], x: Tensor, towards: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(run, (x,), (towards,))[1]
    return tangent


@pytest.fixture(params=[_plain, _named, _in_a_bank], ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """What makes a model, and the rows that are in force while it is called."""
    made: Callable[[], Any] = request.param
    return made


@pytest.fixture
def warm(host: Callable[[], Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """A model that has rotated in the same way several times."""
    run, rows = host()
    with rows(), torch.no_grad():
        for _ in range(4):
            run(_x())
        yield run


class Seen(TorchDispatchMode):
    """The names of the operations that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_see_the_rotation(warm: Callable[[Tensor], Tensor]) -> None:
    with Seen() as seen:
        warm(_x())
    assert sum("roadie.rotate_rows" in name for name in seen.names) == 2


@torch.no_grad()
def test_another_implementation_that_is_asked_for_computes(
    warm: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    eager = choice.IMPLEMENTATIONS["eager"]
    before = eager.rotate
    monkeypatch.setattr(eager, "rotate", lambda *given: (computed.append(1), before(*given))[1])
    with using("eager"):
        warm(_x())
    assert len(computed) == 2


@torch.no_grad()
@pytest.mark.parametrize("derivative", [_in_forward_mode, _by_transform], ids=lambda way: way.__name__)
def test_derivatives_are_those_of_a_model_that_has_not_rotated_before(
    derivative: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor], host: Callable[[], Any]
) -> None:
    """By the very same operations, hence the same bits."""
    x, towards = _x(), torch.randn(B, D)
    (run, rows), (cold, rows_of_cold) = host(), host()
    with rows():
        for _ in range(4):
            run(x)
        found = derivative(run, x, towards)
    with rows_of_cold():
        wanted = derivative(cold, x, towards)
    assert wanted.abs().max() > 0
    assert torch.equal(found, wanted)
