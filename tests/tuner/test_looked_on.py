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


HOSTS = [_plain, _named, _in_a_bank]


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def warm(request: pytest.FixtureRequest) -> Iterator[Callable[[Tensor], Tensor]]:
    """A model that has rotated in the same way several times."""
    run, rows = request.param()
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
def test_the_derivative_in_forward_mode_has_the_rotation(warm: Callable[[Tensor], Tensor]) -> None:
    x, towards = _x(), torch.randn(B, D)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(warm(forward_ad.make_dual(x, towards))).tangent
    step = 1e-3
    wanted = (warm(x + step * towards) - warm(x - step * towards)) / (2 * step)
    torch.testing.assert_close(tangent, wanted, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_transforms_of_torch_func_have_the_rotation(warm: Callable[[Tensor], Tensor]) -> None:
    x, towards = _x(), torch.randn(B, D)
    _, tangent = torch.func.jvp(warm, (x,), (towards,))
    step = 1e-3
    wanted = (warm(x + step * towards) - warm(x - step * towards)) / (2 * step)
    torch.testing.assert_close(tangent, wanted, rtol=1e-2, atol=1e-2)
