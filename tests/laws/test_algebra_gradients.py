"""Gradients of powers and blends: those that finite differences give, and at the identity those of the adapters themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from roadie.algebra import blend, logarithm, power
from roadie.rotation import Rotation, from_parameters

# One pair each, [[a, b], [c, d]]: direct is (a, d), cross (-b, c) up to the sign of the pairing.
BLOCKS = {
    "identity": ((1.0, 1.0), (0.0, 0.0)),
    "scalar": ((2.5, 2.5), (0.0, 0.0)),
    "turn": ((0.8, 0.8), (0.6, 0.6)),
    "small turn": ((1.0, 1.0), (1e-9, 1e-9)),
    "stretch": ((2.0, 0.5), (0.0, 0.0)),
    "shear": ((1.0, 1.0), (0.7, 0.0)),
    "nearly equal eigenvalues": ((1.0, 1.0 + 1e-7), (0.3, 1e-9)),
    "general, real": ((2.0, 1.0), (0.3, -0.4)),
    "general, complex": ((1.2, 0.9), (0.7, 0.3)),
}


def _tensors(name: str) -> tuple[Tensor, Tensor]:
    direct, cross = BLOCKS[name]
    return tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (direct, cross))  # type: ignore[return-value]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("exponent", [0.5, -1.7, 1.0])
def test_powers(name: str, exponent: float) -> None:
    def of(direct: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        found = power(Rotation(direct, cross, 2), exponent)
        return found.direct, found.cross

    assert torch.autograd.gradcheck(of, _tensors(name), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_logarithms(name: str) -> None:
    def of(direct: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        found = logarithm(Rotation(direct, cross, 2))
        return found.direct, found.cross

    assert torch.autograd.gradcheck(of, _tensors(name), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("other", ["identity", "turn", "general, complex"])
def test_blends(name: str, other: str) -> None:
    def of(*parts: Tensor) -> tuple[Tensor, Tensor]:
        found = blend([Rotation(parts[0], parts[1], 2), Rotation(parts[2], parts[3], 2)], [0.7, 0.4])
        return found.direct, found.cross

    assert torch.autograd.gradcheck(of, (*_tensors(name), *_tensors(other)), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_where_training_starts_a_part_gets_its_weight_of_the_gradient(variant: str) -> None:
    size = {"road_1": 4, "road_2": 8, "road_4": 16}[variant]
    theta, alpha = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    weights = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(*scales: float) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for _ in scales for tensor in (theta, alpha)]
        parts = [from_parameters(*leaves[2 * k : 2 * k + 2], variant, 4) for k in range(len(scales))]
        found = blend(parts, scales) if len(scales) > 1 else parts[0]
        return list(torch.autograd.grad((weights[0] * found.direct).sum() + (weights[1] * found.cross).sum(), leaves))

    plain = gradients(1.0)
    of_theta, of_alpha, of_theta_2, of_alpha_2 = gradients(0.7, 0.3)
    for found, wanted, weight in zip(
        (of_theta, of_alpha, of_theta_2, of_alpha_2), plain * 2, (0.7, 0.7, 0.3, 0.3), strict=True
    ):
        torch.testing.assert_close(found, weight * wanted, rtol=1e-14, atol=1e-15)
    assert 0 < float(plain[0].norm()) < math.inf
