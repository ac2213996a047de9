"""RoAd as LoRA: the best matrices of a rank, the error they make, and files that stock PEFT loads."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from tests.laws.reference import dense_rotation
from torch import nn
from transformers.pytorch_utils import Conv1D

import roadie
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import parameter_size

WIDTHS = {"first": 16, "block.second": 24}


class Model(nn.Module):
    """A layer of each kind, with or without biases: 12 inputs, then 16, then 24."""

    def __init__(self, first: type = nn.Linear, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Conv1D(16, 12) if first is Conv1D else nn.Linear(12, 16, bias=bias)
        self.block = nn.ModuleDict({"second": nn.Linear(16, 24, bias=bias), "third": nn.Linear(24, 24)})
        if first is Conv1D:
            nn.init.normal_(self.first.bias)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["third"](self.block["second"](self.first(x)))


def make(variant="road_2", layers=WIDTHS, **config) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for path in layers:
        theta, alpha = torch.randn(2, parameter_size(variant, WIDTHS[path]), generator=generator, dtype=torch.float64)
        parameters[path] = LayerParameters(theta, 1 + 0.3 * alpha, variant, 4)
    return Adapter(parameters, {"peft_type": "ROAD", "variant": variant, **config})


def change(adapter: Adapter, model: nn.Module, path: str) -> torch.Tensor:
    layer = adapter.layers[path]
    turned = dense_rotation(layer.theta, layer.alpha, layer.variant.value, layer.group_size)
    weight = model.get_submodule(path).weight
    weight = weight.mT if isinstance(model.get_submodule(path), Conv1D) else weight
    return (turned - torch.eye(len(turned))) @ weight.detach().double()


def product(lora, path: str) -> torch.Tensor:
    up, down = (lora.tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "BA")
    return up @ down


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_no_matrices_of_the_rank_are_nearer(rank) -> None:
    """The error is that of the singular values left out, and it is the error that was reported."""
    adapter, model = make(), Model()
    lora = roadie.to_lora(adapter, model, rank)
    errors, changes = 0.0, 0.0
    for path in WIDTHS:
        delta = change(adapter, model, path)
        left_out = float(torch.linalg.svdvals(delta)[rank:].square().sum())
        error = float((delta - product(lora, path)).square().sum())
        assert error == pytest.approx(left_out, rel=1e-9, abs=1e-25)
        assert lora.fits[path].error == pytest.approx(error, rel=1e-6, abs=1e-25)
        assert lora.fits[path].rank == rank == torch.linalg.matrix_rank(product(lora, path))
        assert lora.fits[path].relative_error == pytest.approx(math.sqrt(error / float(delta.square().sum())), rel=1e-6)
        errors, changes = errors + error, changes + float(delta.square().sum())
    assert lora.relative_error == pytest.approx(math.sqrt(errors / changes), rel=1e-6)
    # A, B and a bias: 12, 16 and 16, 24.
    assert lora.num_parameters == rank * (12 + 16 + 16 + 24) + 16 + 24


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_a_share_takes_the_smallest_rank_that_keeps_it(share) -> None:
    adapter, model = make(), Model()
    lora = roadie.to_lora(adapter, model, share)
    for path in WIDTHS:
        kept = torch.linalg.svdvals(change(adapter, model, path)).square().cumsum(0)
        kept = kept / kept[-1]
        rank = lora.fits[path].rank
        assert kept[rank - 1] >= share * (1 - 1e-12)
        assert rank == 1 or kept[rank - 2] < share


KINDS = [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)]


@pytest.mark.parametrize(("kind", "bias"), KINDS, ids=["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("rank", [16, 0.999999999999])
def test_stock_peft_loads_it_and_at_full_rank_it_does_the_same(kind, bias, rank, tmp_path) -> None:
    """A rank above that of a layer is its full rank; biases are turned too; the layers' ranks differ."""
    adapter, model = make(), Model(kind, bias)
    lora = roadie.to_lora(adapter, model, rank)
    roadie.save_lora(lora, tmp_path)
    assert {fit.rank for fit in lora.fits.values()} == {12, 16}
    x = torch.randn(5, 12, dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(Model(kind, bias), str(tmp_path), autocast_adapter_dtype=False)
    got = loaded(x)
    for path, layer in adapter.layers.items():
        turned = dense_rotation(layer.theta, layer.alpha, layer.variant.value, layer.group_size)
        x = model.get_submodule(path)(x) @ turned.mT
    torch.testing.assert_close(got, model.block["third"](x), rtol=1e-5, atol=1e-5)
    if bias or kind is Conv1D:
        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"] is True
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(
        merged(torch.ones(1, 12).double()), loaded(torch.ones(1, 12).double()), rtol=1e-9, atol=1e-9
    )


def test_an_adapter_that_changes_nothing_is_rank_one_and_exact() -> None:
    lora = roadie.to_lora(roadie.power(make(), 0), Model(bias=False), 0.9)
    assert {fit.rank for fit in lora.fits.values()} == {1}
    assert lora.relative_error == 0
    assert not any("bias" in name for name in lora.tensors)


def test_small_changes_are_not_lost_to_rounding() -> None:
    adapter = roadie.power(make("road_1"), 1e-7)
    model = Model(dtype=torch.float32)
    lora = roadie.to_lora(adapter, model, 12)
    assert {tensor.dtype for tensor in lora.tensors.values()} == {torch.float32}
    assert lora.fits["first"].relative_error < 1e-5


def test_paths_that_end_in_one_another_keep_their_ranks(tmp_path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(4, 8, bias=False)
            self.a = nn.ModuleDict({"x": nn.Linear(8, 8, bias=False), "y": nn.Linear(8, 8, bias=False)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a["y"](self.a["x"](self.x(x)))

    layers = {p: LayerParameters(torch.randn(8), torch.ones(8), "road_2", 4) for p in ("x", "a.x", "a.y")}
    model = Nested()
    roadie.save_lora(roadie.to_lora(Adapter(layers), model, 6), tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path))
    names = ("x", "a.x", "a.y")
    found = [loaded.base_model.model.get_submodule(name).lora_A["default"].weight.shape[0] for name in names]
    assert found == [4, 6, 6]


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    adapter, model = make(base_model_name_or_path="some/model"), Model()
    for rank in (0, -1, 0.0, 1.5, True, math.nan, "8"):
        with pytest.raises(ConfigError, match="got rank"):
            roadie.to_lora(adapter, model, rank)
    with pytest.raises(AdapterError, match=r"layer block.second: got a model without it"):
        roadie.to_lora(adapter, nn.ModuleDict({"first": nn.Linear(12, 16)}), 2)
    with pytest.raises(AdapterError, match=r"layer first: got 8 outputs in the model and 16"):
        roadie.to_lora(adapter, nn.ModuleDict({"first": nn.Linear(12, 8), "block": model.block}), 2)
    with pytest.raises(AdapterError, match=r"layer first: got a LayerNorm"):
        roadie.to_lora(adapter, nn.ModuleDict({"first": nn.LayerNorm(16), "block": model.block}), 2)
    with pytest.raises(AdapterError, match=r"layer first: got a Linear whose weight is no dense matrix"):
        roadie.to_lora(adapter, nn.ModuleDict({"first": nn.Linear(12, 16, device="meta"), "block": model.block}), 2)
    model.first.weight.data[0, 0] = math.nan
    with pytest.raises(AdapterError, match=r"layer first: .*not finite"):
        roadie.to_lora(adapter, model, 2)
    whole = Adapter(adapter.layers, {}, {"head.weight": torch.zeros(2)})
    with pytest.raises(AdapterError, match=r"no rotations \(head.weight\)"):
        roadie.to_lora(whole, Model(), 2)
    assert list(tmp_path.iterdir()) == []
