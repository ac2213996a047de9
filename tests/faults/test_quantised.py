"""Faults of stock PEFT on quantised layers: bitsandbytes 8-bit and 4-bit, torchao int8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from tests.versions import needs_torchao, needs_torchao_018
from torch import nn

import roadie.tuner.injection

WIDTH, OUT = 64, 128
SETTINGS = {"target_modules": ["layer"], "group_size": 16}
NAMES = ["first", "second"]
ROWS = ["second", "__base__", "first", "second"]
KINDS = ["8bit", "4bit"]


class _Net(nn.Module):
    """One quantised layer, marked as transformers marks a model it has loaded so."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.is_loaded_in_8bit = kind == "8bit"
        self.is_loaded_in_4bit = kind == "4bit"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _net(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> _Net:
    """A net whose layer is stored in 8 or 4 bits, with a bias of `dtype` or without one."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: the layers under test are its own")
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT, dtype=dtype)
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(WIDTH, OUT, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data.float().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(WIDTH, OUT, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
    layer.bias = nn.Parameter(plain.bias.data.clone(), requires_grad=False) if bias else None
    return _Net(layer, kind).to("cpu").eval()


def _x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(len(ROWS), 3, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def _layer(model: Any) -> Any:
    return model.base_model.model.layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_on_bitsandbytes(fault: Any, kind: str, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_net(kind, dtype), NAMES, **SETTINGS)
        x = _x(dtype)
        alone = {}
        for name in NAMES:
            model.set_adapter(name)
            alone[name] = model(x)
        with model.disable_adapter():
            alone["__base__"] = model(x)
        wanted = torch.stack([alone[name][row] for row, name in enumerate(ROWS)])
        got = model(x, adapter_names=ROWS)
        assert got.dtype == dtype
        assert torch.equal(got, wanted)

    with torch.no_grad():
        fault(check, on_stock=TypeError, match="unexpected keyword argument 'adapter_names'")


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_of_a_mixed_batch_on_bitsandbytes(fault: Any, kind: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_net(kind), NAMES, **SETTINGS).train()
        road = {name: p.requires_grad_(True) for name, p in model.named_parameters() if ".road_" in name}
        model(_x(), adapter_names=ROWS).square().sum().backward()
        got = {name: parameter.grad.clone() for name, parameter in road.items()}
        for name in NAMES:
            model.zero_grad()
            model.set_adapter(name)
            mine = torch.tensor([row == name for row in ROWS])
            model(_x())[mine].square().sum().backward()
            for key, parameter in road.items():
                if key.endswith(name):
                    torch.testing.assert_close(got[key], parameter.grad, rtol=1e-4, atol=1e-4)

    fault(check, on_stock=ValueError, match="Cannot pass `adapter_names` when the model is in training mode")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_has_the_dtype_the_base_layer_gives(fault: Any, kind: str, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_net(kind, dtype), NAMES, **SETTINGS)
        wanted = _layer(model).get_base_layer()(_x(dtype)).dtype
        got = model(_x(dtype)).dtype
        assert wanted == dtype
        assert got == wanted, f"the output is {got} for {dtype} input"

    with torch.no_grad():
        fault(check, match=r"the output is torch\.float32 for")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_with_a_half_precision_bias(fault: Any, kind: str, dtype: torch.dtype) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_net(kind, dtype), NAMES, **SETTINGS)
        base, bias, before = _layer(model).get_base_layer(), None, model(_x(dtype))
        bias = base.bias.detach().clone()
        model.merge_adapter()
        assert not torch.equal(base.bias, bias)
        assert _layer(model).merged
        model.unmerge_adapter()
        assert torch.equal(base.bias, bias)
        assert not _layer(model).merged
        assert torch.equal(model(_x(dtype)), before)

    with torch.no_grad():
        fault(check, on_stock=RuntimeError, match="same dtype|expected scalar type")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_bitsandbytes_can_be_taken_back_exactly(fault: Any, kind: str) -> None:
    def check(implementation: Any) -> None:
        # No bias: a float32 one comes back up to its rounding only.
        model = implementation.adapt_many(_net(kind, bias=False), NAMES, **SETTINGS)
        before = model(_x())
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
        assert torch.equal(model(_x()), before), "merging and unmerging changed the quantised weight"

    with torch.no_grad():
        fault(check, match="merging and unmerging changed the quantised weight")


@pytest.mark.parametrize("kind", KINDS)
def test_safe_merge_on_bitsandbytes_refuses_a_non_finite_bias(fault: Any, kind: str) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_net(kind), NAMES, **SETTINGS)
        base = _layer(model).get_base_layer()
        base.bias[5] = float("inf")
        weight = base.weight
        refused = False
        try:
            model.merge_adapter(safe_merge=True)
        except ValueError:
            refused = True
        assert refused, "a non-finite bias was merged"
        assert base.weight is weight
        assert not _layer(model).merged

    with torch.no_grad():
        fault(check, match="a non-finite bias was merged")


def test_one_class_of_layer_for_every_kind_of_weight(fault: Any) -> None:
    def check(implementation: Any) -> None:
        nets = [_net("8bit"), _net("4bit"), _Net(nn.Linear(WIDTH, OUT), "none")]
        layers = [_layer(implementation.adapt_many(net, NAMES, **SETTINGS)) for net in nets]
        assert {repr(layer).split(".")[0] for layer in layers} == {"road"}, "a layer calls itself another method's"
        assert len({type(layer) for layer in layers}) == 1, "a class for each kind of weight"

    fault(check, match="a layer calls itself another method's")


def _torchao_net(bias: bool = True) -> _Net:
    """A net whose layer holds torchao's int8 tensor, with the settings where transformers leaves them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    net = _Net(nn.Linear(WIDTH, OUT, bias=bias), "int8").eval()
    quantize_(net, Int8WeightOnlyConfig())
    net.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    return net


@needs_torchao
@needs_torchao_018
def test_merging_into_torchao_int8(fault: Any) -> None:
    def check(implementation: Any) -> None:
        model = implementation.adapt_many(_torchao_net(bias=False), NAMES, **SETTINGS)
        kind = type(_layer(model).get_base_layer().weight)
        assert "Int8" in kind.__name__
        before, weight = model(_x()), _layer(model).get_base_layer().weight.dequantize()
        dense = _layer(model).get_delta_weight("first") if not implementation.is_stock else None
        model.merge_adapter()
        assert type(_layer(model).get_base_layer().weight) is kind
        # int8 rows with a scale each: the error is at most half a step, 1/254 of the row's largest element.
        wanted, got = dense @ weight, _layer(model).get_base_layer().weight.dequantize()
        assert ((got - wanted).abs() <= wanted.abs().amax(1, keepdim=True) / 254 * 1.01).all()
        model.unmerge_adapter()
        assert torch.equal(model(_x()), before)

    with torch.no_grad():
        fault(check, on_stock=NotImplementedError, match="Int8Tensor")


@needs_torchao
def test_a_mixed_batch_on_torchao_int8(ours: Any) -> None:
    # Stock PEFT has this path for torchao, since the layer is an nn.Linear; what PEFT does well is kept.
    model = ours.adapt_many(_torchao_net(), NAMES, **SETTINGS)
    with torch.no_grad():
        base = _layer(model).get_base_layer()(_x())
        got = model(_x(), adapter_names=ROWS)
        for row, name in enumerate(ROWS):
            dense = torch.eye(OUT) if name == "__base__" else _layer(model).get_delta_weight(name)
            torch.testing.assert_close(got[row], base[row] @ dense.T)


class _ForeignLinear(nn.Module):
    """A quantised layer that is no nn.Linear and that nothing can be merged into, as those of GPTQ, AWQ and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.infeatures, self.outfeatures = WIDTH, OUT
        self.register_buffer("qweight", torch.randint(-7, 8, (OUT, WIDTH), dtype=torch.int8))
        self.scale = nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.to(x.dtype).T * self.scale


PATTERNS = {"variant_pattern": {"layer": "road_2"}, "group_size_pattern": {"layer": 4}}


@pytest.mark.parametrize(
    "settings", [{}, PATTERNS, {"adapt_group_size": True}], ids=["plain", "patterns", "adapted size"]
)
def test_quantisations_whose_layers_are_no_linear_layers(
    fault: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    resolve = roadie.tuner.injection.resolve_quantization_backend

    def resolved(base: nn.Module, **kwargs: Any) -> Any:
        foreign = isinstance(base, _ForeignLinear)
        return ForwardOnlyQuantizationBackend("foreign") if foreign else resolve(base, **kwargs)

    # What PEFT's resolver answers for such layers; the packages that make real ones need other machines.
    monkeypatch.setattr(roadie.tuner.injection, "resolve_quantization_backend", resolved)

    def check(implementation: Any) -> None:
        extra = {} if implementation.is_stock else settings
        model = implementation.adapt_many(_Net(_ForeignLinear(), "none"), NAMES, **{**SETTINGS, **extra})
        base, layer = _layer(model).get_base_layer()(_x()), _layer(model)
        wanted = torch.stack(
            [base[i] if name == "__base__" else base[i] @ layer.get_delta_weight(name).T for i, name in enumerate(ROWS)]
        )
        torch.testing.assert_close(model(_x(), adapter_names=ROWS), wanted)
        with pytest.raises(ValueError, match="cannot store a changed weight"):
            model.merge_adapter()
        assert not layer.merged

    with torch.no_grad():
        fault(check, on_stock=ValueError, match=r"Target module _ForeignLinear\(\) is not supported")
