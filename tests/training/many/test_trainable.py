"""The bank that trains: outputs and gradients against plain autograd on the definition of a rotation, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.gradients import collect_gradients
from torch import nn

from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.errors import RoutingError
from roadie.kernels import Keep
from roadie.rotation import Variant, from_parameters, rotate

WIDTH, ROWS, TOKENS = 16, 7, 3
SHAPES = {
    "a": ((Variant.ROAD_1, 8), ("one", "two")),
    "b": ((Variant.ROAD_1, 8), ("one", "two")),
    "c": ((Variant.ROAD_2, 4), ("two",)),
    "d": ((Variant.ROAD_4, 16), ("one", "two")),
    "e": ((Variant.ROAD_1, 2), ("one",)),
}
NAMES = ["a", None, "c", "d", "b", "e", "a"]


class Two(nn.Module):
    """Two layers, the first without any gradient from before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def layers_of(name):
    (variant, group_size), paths = SHAPES[name]
    return [AdaptedLayer(path, WIDTH, variant, (group_size,)) for path in paths]


def filled(names, keep=None):
    """A bank with these adapters, their parameters random and far from the identity, equal for equal names."""
    bank = TrainableBank(torch.device("cpu"), keep)
    bank.join({name: layers_of(name) for name in names})
    for family in bank.families:
        for index, name in enumerate(family.names):
            generator = torch.Generator().manual_seed(ord(name))
            for stack in family.stacks:
                values = torch.randn(stack.parameters[:, :, index].shape, generator=generator)
                stack.parameters[:, :, index] = values + torch.tensor([0.0, 3.0]).view(1, 2, 1)
    return bank


def expected(model, bank, x):
    """Outputs, and for each adapter the gradients of theta and alpha by layer, by plain autograd in float64."""
    leaves = {
        name: {
            path: (layer.theta.double().requires_grad_(), layer.alpha.double().requires_grad_(), layer)
            for path, layer in bank.family_of(name).adapter_layers(bank.family_of(name).row(name)).items()
        }
        for name in bank.names
    }

    def turned(path, y, name):
        if name is None or path not in leaves[name]:
            return y
        theta, alpha, layer = leaves[name][path]
        return rotate(y, from_parameters(theta, alpha, layer.variant, layer.group_size))

    model = model.double()
    rows = [
        turned("two", model.two(torch.tanh(turned("one", model.one(row), name))), name)
        for row, name in zip(x.double(), NAMES, strict=True)
    ]
    z = torch.stack(rows)
    loss_of(z).backward()
    gradients = {n: {p: torch.stack((t.grad, a.grad)) for p, (t, a, _) in by.items()} for n, by in leaves.items()}
    return z.detach(), gradients


def loss_of(z):
    weights = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z)
    return (weights * z).sum() + (z**3).sum() / 10


def gradients_of(bank):
    return {
        name: {
            path: stack.gradients[index, :, family.names.index(name)]
            for stack in family.stacks
            for index, path in enumerate(stack.paths)
        }
        for family in bank.families
        for name in family.names
    }


@pytest.mark.parametrize("keep", [None, Keep.INPUT, Keep.OUTPUT])
@pytest.mark.parametrize("passes", [1, 2])
def test_outputs_and_gradients_are_those_of_the_definition(keep, passes):
    names = sorted(SHAPES)
    model, bank = Two(), filled(names, keep)
    x = torch.randn(ROWS, TOKENS, 5, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([-1 if name is None else bank.names.index(name) for name in NAMES])
    bank.make_tables()
    with bank.attached(model, ["one", "two"]):
        for _ in range(passes):
            with bank.routed(slots):
                z = model(x)
                loss_of(z).backward()
    squares = torch.cat(collect_gradients(bank))
    found = gradients_of(bank)
    right, gradients = expected(Two(), bank, x)
    assert z.dtype == torch.float32
    assert torch.allclose(z.double(), right, rtol=1e-5, atol=1e-5)
    for slot, name in enumerate(bank.names):
        assert found[name].keys() == gradients[name].keys()
        for path, gradient in gradients[name].items():
            error = (found[name][path].double() - passes * gradient).abs().max()
            # with the output kept, a solve of each block stands between the sums and the gradients
            assert error <= 2e-4 * passes * gradient.abs().max(), (name, path)
        norm = sum((passes * gradient).square().sum() for gradient in gradients[name].values())
        assert squares[slot].item() == pytest.approx(norm.item(), rel=1e-3)


def test_tokens_of_a_packed_batch_choose_their_adapters_too():
    model, bank = Two(), filled("ab")
    x = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    bank.make_tables()
    with bank.attached(model, ["one", "two"]):
        with bank.routed(torch.tensor([[0, -1, 1, 0]])):
            packed = model(x)
        with bank.routed(torch.tensor([0, -1, 1, 0])):
            rows = model(x[0])
    assert torch.equal(packed[0], rows)


def test_nothing_is_left_of_a_bank_that_was_attached():
    model, bank = Two(), filled("a")
    x = torch.randn(2, 5)
    before = model(x)
    bank.make_tables()

    def use():
        with bank.attached(model, ["one", "two"]):
            assert torch.equal(model(x), before), "rows that are not routed"
            with bank.routed(torch.tensor([0, -1])):
                inside = model(x)
                assert not torch.allclose(inside[0], before[0], atol=1e-3)
                assert torch.equal(inside[1], before[1])
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert torch.equal(model(x), before)
    assert not model.one._forward_hooks


def test_an_adapter_that_left_is_not_found():
    bank = filled("abc")
    row = bank.family_of("c").row("c")
    bank.keep_only(["c"])
    assert bank.names == ["c"]
    assert all(map(torch.equal, row, bank.family_of("c").row("c")))
    with pytest.raises(RoutingError, match="got adapter 'a'; wanted one of c"):
        bank.family_of("a")
