"""One linear layer against stock PEFT: forward, gradients and merge, for every variant, group size, dtype and bias.

The truth is dense float64 arithmetic on the same rounded inputs; in half precision ours must be as near to it as stock's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.laws.bounds import assert_within
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation
from torch import nn

import roadie
from roadie.testing import assert_as_accurate_as, randomise, stock_peft
from roadie.testing.rival import is_stock

every = [
    pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str),
    pytest.mark.parametrize("group_size", [2, 4, 16, 64]),
    pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"]),
]


def every_case(test: Any) -> Any:
    for mark in every:
        test = mark(test)
    return test


def pair(variant: str, group_size: int, dtype: torch.dtype, bias: bool, **arguments: Any) -> tuple[Any, Any]:
    """Ours and stock's, of equal weights and parameters."""
    settings = {"variant": variant, "group_size": group_size, "target_modules": ["first"]}
    base = [linear_chain(32, 64, bias=bias, dtype=dtype) for _ in range(2)]
    ours = roadie.get_peft_model(base[0], roadie.RoadConfig(**settings), **arguments)
    with stock_peft() as config:
        stock = peft.get_peft_model(base[1], config(**settings), **arguments)
    assert is_stock(stock)
    assert not is_stock(ours)
    return randomise(ours), randomise(stock)


def layer(model: Any) -> Any:
    return model.base_model.model.first


def dense(model: Any) -> torch.Tensor:
    first = layer(model)
    theta, alpha = first.road_theta["default"].detach(), first.road_alpha["default"].detach()
    return dense_rotation(theta, alpha, first.variant["default"], first.group_size["default"])


@every_case
def test_forward_and_gradients(variant: str, group_size: int, dtype: torch.dtype, bias: bool) -> None:
    ours, stock = pair(variant, group_size, dtype, bias)
    ours.base_model.set_kept_for_backward("input")  # which loses nothing; what road_1 keeps has a test of its own below
    results = []
    x, probe = batch(dtype)
    for model in (ours, stock):
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        parameters = [layer(model).road_theta["default"], layer(model).road_alpha["default"]]
        results.append([output.detach(), *torch.autograd.grad((output * probe).sum(), [inputs, *parameters])])
    truth = truth_of(ours, x, probe)
    for got, rival, exact in zip(*results, truth, strict=True):
        # Sums over tokens round in another order; sixteen roundings of float32 where the rival happens to be lucky.
        floor = 16 * torch.finfo(torch.float32).eps if got.dtype == torch.float32 else 0.0
        if not floor or float((got.double() - exact).norm() / exact.norm()) > floor:
            assert_as_accurate_as(got, rival, exact, slack=1.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [2, 4, 16, 64])
def test_gradients_from_the_kept_output_are_off_by_its_rounding(group_size: int, dtype: torch.dtype) -> None:
    """With z = alpha e^(i theta) h a pair, dL/dalpha = sum of <g, z> / alpha and dL/dtheta = sum of <g, J z>: the relative
    error of z, half a step of its dtype, goes into each term; and a float32 rounding for each of a dozen operations."""
    ours, _ = pair("road_1", group_size, dtype, bias=True)
    x, probe = batch(dtype)
    theta, alpha = layer(ours).road_theta["default"], layer(ours).road_alpha["default"]
    output = ours(x)
    got = torch.autograd.grad((output * probe).sum(), [theta, alpha])
    truth = truth_of(ours, x, probe)[2:]
    g1, g2 = pairs_of(probe.abs().double(), group_size)
    z1, z2 = pairs_of(output.detach().abs().double(), group_size)
    step = torch.finfo(dtype).eps / 2 + 12 * torch.finfo(torch.float32).eps
    assert_within(got[0], truth[0], step * (g1 * z2 + g2 * z1).sum(0), "theta")
    assert_within(got[1], truth[1], step * (g1 * z1 + g2 * z2).sum(0) / alpha.detach().abs().double(), "alpha")


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_second_derivatives(variant: str) -> None:
    """create_graph=True, as penalties on gradients and second-order optimizers use it."""
    results = []
    for model in pair(variant, 16, torch.float32, bias=True):
        x, probe = batch(torch.float32)
        x.requires_grad_()
        wanted = [x, layer(model).road_theta["default"], layer(model).road_alpha["default"]]
        first = torch.autograd.grad(((model(x) * probe) ** 3).sum(), wanted, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**2).sum() for g in first), wanted)])
    for got, rival in zip(*results, strict=True):
        assert float((got - rival).norm()) <= 1e-5 * float(rival.norm())  # a few dozen roundings of float32


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and what outputs are multiplied with to make a loss that rotations change."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 32, generator=generator).to(dtype), torch.randn(6, 64, generator=generator).to(dtype)


def pairs_of(y: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, D] -> the first and the second members of all pairs, each [T, D/2]."""
    groups = y.reshape(len(y), -1, 2, group_size // 2)
    return groups[:, :, 0].flatten(1), groups[:, :, 1].flatten(1)


def truth_of(model: Any, x: torch.Tensor, probe: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float64, from the base layer's output as the dtype rounds it."""
    first = layer(model)
    base = first.get_base_layer()
    theta, alpha = (p["default"].detach().double().requires_grad_() for p in (first.road_theta, first.road_alpha))
    with torch.no_grad():
        h = base(x).double()
    h.requires_grad_()
    output = h @ dense_rotation(theta, alpha, first.variant["default"], first.group_size["default"]).T
    grad_h, grad_theta, grad_alpha = torch.autograd.grad((output * probe.double()).sum(), [h, theta, alpha])
    return [output.detach(), grad_h @ base.weight.detach().double(), grad_theta, grad_alpha]


@every_case
def test_merge(variant: str, group_size: int, dtype: torch.dtype, bias: bool) -> None:
    ours, stock = pair(variant, group_size, dtype, bias)
    base = layer(ours).get_base_layer()
    truths = [dense(ours) @ tensor.detach().double() for tensor in base.parameters()]
    for model in (ours, stock):
        layer(model).merge()
    merged = zip(base.parameters(), layer(stock).get_base_layer().parameters(), truths, strict=True)
    for got, rival, truth in merged:
        assert_as_accurate_as(got.detach(), rival.detach(), truth)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_names_shapes_and_dtypes_of_parameters(dtype: torch.dtype, variant: str, autocast: bool) -> None:
    models = pair(variant, 16, dtype, True, autocast_adapter_dtype=autocast)
    described = [{name: (p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()} for m in models]
    assert described[0] == described[1]


def test_random_starts_are_those_of_stock_under_one_seed() -> None:
    settings = {"group_size": 4, "target_modules": ["0"], "init_weights": False}

    def start(config: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
        return [parameter.detach() for name, parameter in model.named_parameters() if "road_" in name]

    with stock_peft() as config:
        wanted = start(config(**settings))
    assert all(torch.equal(a, b) for a, b in zip(start(roadie.RoadConfig(**settings)), wanted, strict=True))


@every_case
def test_checkpoints_go_both_ways(
    variant: str, group_size: int, dtype: torch.dtype, bias: bool, tmp_path: Path
) -> None:
    """What one tuner saves, the other loads: the same bits, and the outputs of a model that never was on disk."""
    ours, stock = pair(variant, group_size, dtype, bias, autocast_adapter_dtype=False)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()

    def base() -> nn.Module:
        return linear_chain(32, 64, bias=bias, dtype=dtype)

    with stock_peft():
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False)
    mine = roadie.PeftModel.from_pretrained(base(), tmp_path / "stock", autocast_adapter_dtype=False)
    assert is_stock(theirs)
    assert not is_stock(mine)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for loaded, saved in ((theirs, stock), (mine, ours)):
        assert [bits(p) for p in loaded.parameters()] == [bits(p) for p in saved.parameters()]
        assert torch.equal(loaded.eval()(x), saved.eval()(x))


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
