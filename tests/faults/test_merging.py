"""Faults of stock PEFT in what merging does to weights: rounding, drift, half-done merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.road.layer import _get_delta_weight
from torch import nn

from roadie.testing import relative_error

OUT, WIDTH = 64, 48
SETTINGS = {"target_modules": ["0"], "group_size": 16}
VARIANTS = ["road_1", "road_2", "road_4"]


def _linear(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, OUT, dtype=dtype))


def _state(layer: Any) -> tuple[Any, ...]:
    base = layer.get_base_layer()
    return base.weight.detach().clone(), base.bias.detach().clone(), list(layer.merged_adapters), layer.merged


def _assert_same_state(layer: Any, before: tuple[Any, ...], what: str) -> None:
    weight, bias, names, merged = _state(layer)
    assert torch.equal(weight, before[0]), f"{what}: the weight was changed"
    assert torch.equal(bias.nan_to_num(0, 1, -1), before[1].nan_to_num(0, 1, -1)), f"{what}: the bias was changed"
    assert (names, merged) == before[2:], f"{what}: the layer's books were changed"


def _layer_of(model: Any) -> Any:
    return model.base_model.model[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_twenty_merges_and_unmerges_give_back_the_same_half_precision_weight(
    fault: Any, dtype: torch.dtype, variant: str
) -> None:
    def check(implementation: Any) -> None:
        # Moderate R for stock's sake; a large one drifts by several percent in a single cycle.
        model = implementation.adapt_many(_linear(dtype), ["default"], variant=variant, **SETTINGS)
        before = _state(_layer_of(model))
        for _ in range(20):
            model.merge_adapter()
            assert _layer_of(model).merged
            model.unmerge_adapter()
        drift = (_state(_layer_of(model))[0] - before[0]).abs().max() / before[0].abs().max()
        assert drift == 0, f"the weight drifted by {float(drift):.2%} of its largest element"
        _assert_same_state(_layer_of(model), before, "20 cycles")

    fault(check, match="the weight drifted")


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_merge_with_a_large_rotation_can_be_taken_back(fault: Any, variant: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(torch.bfloat16), ["default"], scale=1.0, variant=variant, **SETTINGS)
        before = _state(_layer_of(model))
        model.merge_adapter()
        model.unmerge_adapter()
        _assert_same_state(_layer_of(model), before, "one cycle")

    fault(check, match="one cycle: the weight was changed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_rounds_once(fault: Any, safe_merge: bool, variant: str, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(dtype), ["default"], variant=variant, **SETTINGS)
        layer = _layer_of(model)
        weight, bias = (tensor.double() for tensor in _state(layer)[:2])
        turn = _dense(layer)
        model.merge_adapter(safe_merge=safe_merge)
        for name, got, truth in (("weight", _state(layer)[0], turn @ weight), ("bias", _state(layer)[1], turn @ bias)):
            assert got.dtype == dtype
            once = relative_error(truth.to(dtype), truth)
            error = relative_error(got, truth)
            # A thousandth: the float32 arithmetic before the rounding, which seldom tips an element.
            assert error <= 1.001 * once, f"{name}: the error is {error:.2e}; one rounding has {once:.2e}"

    fault(check, match=r"weight: the error is .*; one rounding has")


def _dense(layer: Any) -> torch.Tensor:
    """R by PEFT's own formula, in float64: the truth for both implementations."""
    theta, alpha = layer.road_theta["default"].data.double(), layer.road_alpha["default"].data.double()
    return _get_delta_weight(layer.variant["default"], layer.group_size["default"], theta, alpha)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_with_half_precision_adapters_rounds_once(fault: Any, variant: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(torch.bfloat16), ["default"], variant=variant, **SETTINGS)
        layer = _layer_of(model)
        layer.road_theta.to(torch.bfloat16)
        layer.road_alpha.to(torch.bfloat16)
        x = torch.randn(32, WIDTH, dtype=torch.bfloat16)
        with torch.no_grad():
            truth = layer.get_base_layer()(x).double() @ _dense(layer).T
            got = model(x)
        assert got.dtype == torch.bfloat16
        once, error = relative_error(truth.to(torch.bfloat16), truth), relative_error(got, truth)
        assert error <= 1.001 * once, f"the error is {error:.2e}; one rounding has {once:.2e}"

    fault(check, match=r"the error is .*; one rounding has")


@pytest.mark.parametrize("route", ["layer", "model", "unload"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_safe_merge_with_a_non_finite_bias_changes_nothing(fault: Any, value: float, route: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(), ["default"], **SETTINGS)
        layer = _layer_of(model)
        with torch.no_grad():
            layer.get_base_layer().bias[5] = value
        before = _state(layer)
        merge = {"layer": layer.merge, "model": model.merge_adapter, "unload": model.merge_and_unload}[route]
        with pytest.raises(ValueError, match="NaNs detected in the merged bias"):
            merge(safe_merge=True)
        _assert_same_state(layer, before, "refused merge")
        assert _layer_of(model) is layer

    fault(check, match="refused merge: the weight was changed")


def test_safe_merge_changes_no_layer_when_a_later_one_refuses(fault: Any) -> None:
    def check(implementation: Any) -> None:
        base = nn.Sequential(*_linear(), nn.Linear(OUT, OUT))
        model = implementation.adapt_many(base, ["default"], target_modules=["0", "1"], group_size=16)
        first, second = model.base_model.model[0], model.base_model.model[1]
        with torch.no_grad():
            second.get_base_layer().weight[3, 3] = float("nan")
        before = _state(first)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
        _assert_same_state(first, before, "first layer")
        assert not second.merged

    fault(check, match="first layer: the weight was changed")


@pytest.mark.parametrize("route", ["layer", "model"])
def test_unmerging_a_singular_rotation_is_refused_before_anything_changes(fault: Any, route: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(), ["default"], **SETTINGS)
        layer = _layer_of(model)
        with torch.no_grad():
            layer.road_alpha["default"][3] = 0
        model.merge_adapter()
        merged = _state(layer)
        unmerge = {"layer": layer.unmerge, "model": model.unmerge_adapter}[route]
        with pytest.raises((ValueError, RuntimeError)):  # stock: torch's LinAlgError, a RuntimeError
            unmerge()
        _assert_same_state(layer, merged, "refused unmerge")

    fault(check, match="refused unmerge: the layer's books were changed")


@pytest.mark.parametrize("order", [["good", "singular"], ["singular", "good"]])
def test_unmerging_two_adapters_one_of_them_singular_changes_neither(fault: Any, order: list[str]) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(), ["good", "singular"], **SETTINGS)
        layer = _layer_of(model)
        with torch.no_grad():
            layer.road_alpha["singular"][3] = 0
        for name in order:
            model.merge_adapter([name])
        merged = _state(layer)
        with pytest.raises((ValueError, RuntimeError)):
            model.unmerge_adapter()
        _assert_same_state(layer, merged, "refused unmerge")

    fault(check, match="refused unmerge: the (weight|layer's books)")


def test_unmerging_uses_the_values_that_were_merged(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_linear(), ["default"], **SETTINGS)
        layer = _layer_of(model)
        before = _state(layer)[0]
        model.merge_adapter()
        with torch.no_grad():
            layer.road_theta["default"].add_(0.5)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight, before, msg="another rotation was taken back")

    with torch.no_grad():
        fault(check, match="another rotation was taken back")
