"""Quantised base layers on the CPU: bitsandbytes 8-bit and 4-bit, and torchao int8 with plain and with quantised inputs.

The bound of a merge. Storing a weight moves each element by at most half a step of its format (`_half_steps`); the
inputs are quantised the same way before and after, so that an output moves by at most the sum of |x| times these.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from tests.laws.bounds import assert_within
from tests.versions import (
    needs_exact_products_of_int8,
    needs_torchao,
    needs_torchao_018,
    needs_torchao_018_to_merge,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import roadie
from roadie.errors import MergeError
from roadie.testing import randomise

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one warning for each layer and call
NAMES = ["first", "second"]
ROWS = ["second", "__base__", "first", "second"]
IDS = torch.arange(4 * 6).reshape(4, 6) * 7 % 128
SETTINGS = {"target_modules": "all-linear", "group_size": 16, "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Kind:
    """One way to quantise: what transformers is told, and the backend PEFT finds."""

    name: str
    settings: Callable[[torch.dtype], Any]
    backend: str

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=self.settings(dtype), dtype=dtype, device_map="cpu"
        )

    def __str__(self) -> str:
        return self.name


KINDS = [
    # With the default threshold columns that are large in ANY row are computed apart: rows would depend on each other.
    Kind("bnb8", lambda dtype: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), "bnb 8bit"),
    Kind(
        "bnb4",
        lambda dtype: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
        ),
        "bnb 4bit",
    ),
    Kind("torchao", lambda dtype: _of_torchao("Int8WeightOnlyConfig"), "torchao"),
    Kind("torchao-dynamic", lambda dtype: _of_torchao("Int8DynamicActivationInt8WeightConfig"), "torchao"),
]


def _of_torchao(name: str) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


def _kinds(*marks_of_torchao: tuple[Any, ...]) -> Any:
    """For every kind of bitsandbytes, and as many of torchao as marks are given: each tuple is what that kind needs."""
    with_marks = zip(KINDS[2:], marks_of_torchao, strict=False)
    params = [pytest.param(kind, marks=(needs_torchao, *marks)) for kind, marks in with_marks]
    return pytest.mark.parametrize("kind", [*KINDS[:2], *params], ids=str)


every_kind = _kinds((), ())
# torchao rounds the inputs of its dynamic kind without a gradient: nothing behind the first layer can learn.
every_trainable_kind = _kinds(())
_TO_MERGE_DYNAMIC = (needs_torchao_018_to_merge, needs_exact_products_of_int8)
every_mergeable_kind = _kinds((), _TO_MERGE_DYNAMIC)
# Of these the stored bits are compared, or saved.
every_trainable_kind_with_its_bits = _kinds((needs_torchao_018,))
every_mergeable_kind_with_its_bits = _kinds((needs_torchao_018,), _TO_MERGE_DYNAMIC)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _adapted(base: Any, *, scale: float = 0.3, **settings: Any) -> Any:
    model = roadie.get_peft_model(base, roadie.RoadConfig(**{**SETTINGS, **settings}), adapter_name="first")
    model.add_adapter("second", roadie.RoadConfig(**{**SETTINGS, **settings}))
    for seed, name in enumerate(NAMES):
        randomise(model, seed=seed, scale=scale, adapter=name)
    return model.eval()


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, roadie.Linear)}


def _stored(layer: Any) -> list[Tensor]:
    """The tensors a quantised weight consists of, copied."""
    weight = layer.get_base_layer().weight
    parts = [weight.qdata, weight.scale] if hasattr(weight, "qdata") else [weight.data]
    if getattr(weight, "quant_state", None) is not None:
        parts.append(weight.quant_state.absmax)
    state = getattr(layer.get_base_layer(), "state", None)
    if state is not None:
        parts.append(weight.SCB if weight.SCB is not None else state.SCB)
    return [part.detach().clone() for part in parts]


def _dense(layer: Any) -> Tensor:
    return layer.quantization_backend.get_base_weight(layer.get_base_layer()).detach().clone()


def _half_steps(kind: Kind, wanted: Tensor) -> Tensor:
    """How far quantising ``wanted [D, in]`` may move each element: half the distance of two neighbours of its format."""
    if kind.name == "bnb4":
        codes = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        largest = wanted.reshape(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(wanted.shape)
        return largest * codes.sort().values.diff().max() / 2
    largest = wanted.abs().amax(1, keepdim=True).expand_as(wanted)
    rounded_to_half = 2.0**-11 if kind.name == "bnb8" else 0.0  # bitsandbytes quantises a float16 copy
    return largest * (0.5 / 127 + rounded_to_half)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **arguments).logits


@every_kind
@every_dtype
def test_the_output_keeps_the_dtype_of_the_base_layer(kind: Kind, dtype: torch.dtype, base_folder: Path) -> None:
    base = kind.load(base_folder, dtype)
    x = torch.randn(3, 5, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    plain = base.model.layers[0].self_attn.q_proj(x).detach()
    layer = _layers(_adapted(base))["base_model.model.model.layers.0.self_attn.q_proj"]
    assert layer.quantization_backend.backend_name == kind.backend
    assert (layer.in_features, layer.out_features) == (64, 64)
    got = layer(x)
    assert got.dtype == plain.dtype == dtype
    dense = layer.get_delta_weight("first").double().T
    wanted, size = plain.double() @ dense, plain.double().abs() @ dense.abs()
    # Two products and a sum in float32, of rotations that are themselves rounded, and one rounding to the dtype.
    assert_within(got, wanted, 7 * _roundoff(torch.float32) * size + 2 * _roundoff(dtype) * wanted.abs(), "output")


@every_kind
def test_the_start_is_the_base_model(kind: Kind, base_folder: Path) -> None:
    base = kind.load(base_folder)
    plain = _logits(base)
    model = roadie.get_peft_model(base, roadie.RoadConfig(**SETTINGS)).eval()
    assert len(_layers(model)) == 14
    assert torch.equal(_logits(model), plain)


@every_trainable_kind_with_its_bits
@every_dtype
def test_training_learns_and_changes_adapters_only(kind: Kind, dtype: torch.dtype, base_folder: Path) -> None:
    model = roadie.get_peft_model(kind.load(base_folder, dtype), roadie.RoadConfig(**SETTINGS)).train()
    layers = _layers(model)
    stored = {name: _stored(layer) for name, layer in layers.items()}
    dense = {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n or "embed" in n}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(layers)
    assert {p.dtype for p in trainable} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable, lr=3e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(a, b) for name in layers for a, b in zip(stored[name], _stored(layers[name]), strict=True))
    assert dense
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in dense.items())


@every_trainable_kind_with_its_bits
def test_gradients_are_those_of_the_dequantised_model(kind: Kind, base_folder: Path) -> None:
    quantised = nn.Sequential(kind.load(base_folder).model.layers[0].mlp.gate_proj)
    model = _adapted(quantised, target_modules=["0"], task_type=None).train()
    layer = next(iter(_layers(model).values()))
    plain = nn.Sequential(nn.Linear(64, 128, bias=False))
    with torch.no_grad():
        stored = layer.get_base_layer().weight
        plain[0].weight.copy_(stored.dequantize() if hasattr(stored, "qdata") else _dense(layer))
    other = _adapted(plain, target_modules=["0"], task_type=None).train()
    x, y = (torch.randn(5, n, generator=torch.Generator().manual_seed(n)) for n in (64, 128))
    for m in (model, other):
        (m(x) * y).sum().backward()
    # Training in bitsandbytes' 8-bit goes through float16 on some devices: two roundings of 2^-11 of sums of 64 terms.
    bound = 2**-9 if kind.name == "bnb8" else 1e-4
    twin = next(iter(_layers(other).values()))
    for got, wanted in ((layer.road_theta, twin.road_theta), (layer.road_alpha, twin.road_alpha)):
        size = wanted["first"].grad.abs().max().item()
        torch.testing.assert_close(got["first"].grad, wanted["first"].grad, rtol=0, atol=bound * size)


@every_kind
@every_dtype
def test_rows_of_a_mixed_batch_are_what_each_adapter_gives(
    kind: Kind, dtype: torch.dtype, base_folder: Path, row_by_row: Callable[..., Tensor]
) -> None:
    model = _adapted(kind.load(base_folder, dtype))
    wanted = row_by_row(model, ROWS, lambda: _logits(model))
    got = _logits(model, adapter_names=ROWS)
    assert got.dtype == wanted.dtype
    assert not torch.equal(_logits(model)[0], wanted[0])
    # Row by row the same numbers in the same order: nothing may differ, not even the last bit.
    assert torch.equal(got, wanted)


@every_kind
def test_generation_with_an_adapter_for_each_row(
    kind: Kind, base_folder: Path, row_by_row: Callable[..., Tensor]
) -> None:
    model = _adapted(kind.load(base_folder), scale=1.0)

    def generate(**arguments: Any) -> Tensor:
        return model.generate(
            IDS, do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None, num_beams=2, **arguments
        )

    wanted = row_by_row(model, ROWS, generate)
    assert not torch.equal(generate(), wanted)
    assert torch.equal(generate(adapter_names=ROWS), wanted)


@every_trainable_kind
def test_rows_train_their_own_adapters(kind: Kind, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder)).train()
    road = {n: p.requires_grad_(True) for n, p in model.named_parameters() if ".road_" in n}
    model(IDS, adapter_names=ROWS).logits.square().mean().backward()
    got = {name: p.grad.clone() for name, p in road.items()}
    model.zero_grad()
    for adapter in NAMES:
        model.set_adapter(adapter)
        logits = model(IDS).logits.square() / IDS.numel() / 128
        logits[torch.tensor([row == adapter for row in ROWS])].sum().backward()
    for name, parameter in road.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-4 * parameter.grad.abs().max().item())


@every_kind
def test_saved_and_loaded_it_is_the_same(kind: Kind, base_folder: Path, tmp_path: Path) -> None:
    model = _adapted(kind.load(base_folder))
    wanted = {name: _logits(model, adapter_names=[name] * 4) for name in NAMES}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kind.load(base_folder), tmp_path / "first", adapter_name="first").eval()
    again.load_adapter(tmp_path / "second", adapter_name="second")
    assert {layer.quantization_backend.backend_name for layer in _layers(again).values()} == {kind.backend}
    for name in NAMES:
        assert torch.equal(_logits(again, adapter_names=[name] * 4), wanted[name])


@every_mergeable_kind
@every_dtype
@pytest.mark.parametrize("safe_merge", [False, True], ids=["plain", "safe"])
def test_a_merge_is_within_half_a_step_of_the_rotated_weight(
    kind: Kind, dtype: torch.dtype, safe_merge: bool, base_folder: Path
) -> None:
    model = _adapted(kind.load(base_folder, dtype))
    layers = _layers(model)
    before = {name: _dense(layer) for name, layer in layers.items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe_merge)
    for name, layer in layers.items():
        assert layer.merged_adapters == ["first"]
        wanted = layer.get_delta_weight("first").double() @ before[name].double()
        moved = (_dense(layer).double() - wanted).abs()
        # The dense weight, the rotated one and the one read back are each rounded to the dtype they are kept in.
        rounded = 3 * _roundoff(before[name].dtype) * wanted.abs().amax(1, keepdim=True)
        assert bool((moved <= _half_steps(kind, wanted) * (1 + 1e-3) + rounded).all()), name
        assert bool(((wanted - before[name]).abs() > _half_steps(kind, wanted)).any()), "the bound sees no merge at all"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


@every_mergeable_kind
def test_a_merged_layer_gives_what_the_unmerged_one_does(kind: Kind, base_folder: Path) -> None:
    layer = _adapted(kind.load(base_folder)).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layer.get_delta_weight("first") @ _dense(layer)
        unmerged = layer(x)  # bitsandbytes may repack the weight here, and PEFT's backend then misreads it
        layer.merge()
        merged = layer(x)
    if getattr(getattr(layer.get_base_layer().weight, "quant_state", None), "packing_format_for_cpu", False):
        # Inputs, weights and scales of repacked layers are rounded to bfloat16, in both results and in what was merged.
        bound_of_packing = 8 * 2.0**-9 * x.abs() @ wanted.abs().T
    else:
        bound_of_packing = torch.zeros(())
    bound = bound_of_packing + x.abs() @ _half_steps(kind, wanted).T
    # 8-bit products come out in float16, and inputs that are quantised to int8 are off by up to 1/254 of the largest.
    bound += 2 * 2.0**-11 * unmerged.abs() + 1e-5
    bound += x.abs().amax(1, keepdim=True) * (_half_steps(kind, wanted).sum(1) / 127)
    assert bool(((merged - unmerged).abs() <= bound).all())
    with torch.no_grad(), torch.random.fork_rng():
        plain = layer.get_base_layer()(x)
    assert torch.equal(plain, merged)


@every_mergeable_kind
@every_dtype
def test_a_merged_model_is_close_to_the_unmerged_one(kind: Kind, dtype: torch.dtype, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder, dtype))
    unmerged = _logits(model).double()
    with model.disable_adapter():
        plain = _logits(model).double()
    model.merge_adapter()
    merged = _logits(model).double()
    # Fourteen layers of quantisation noise; half steps as a share of the weights' size say how much one layer gives.
    share = {"bnb8": 0.05, "bnb4": 0.5, "torchao": 0.05, "torchao-dynamic": 0.05}[kind.name]
    assert 0 < (merged - unmerged).norm() < share * (plain - unmerged).norm()


@every_mergeable_kind_with_its_bits
@every_dtype
def test_unmerging_restores_the_quantised_weight_bit_for_bit(kind: Kind, dtype: torch.dtype, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder, dtype))
    wanted = _logits(model)
    stored = {name: _stored(layer) for name, layer in _layers(model).items()}
    for adapters in (["first"], ["second", "first"]):
        model.merge_adapter(adapters)
        merged = _logits(model)
        assert not torch.equal(merged, wanted)
        model.unmerge_adapter()
        for name, layer in _layers(model).items():
            assert not layer.merged
            assert all(torch.equal(a, b) for a, b in zip(stored[name], _stored(layer), strict=True)), name
        assert torch.equal(_logits(model), wanted)


@every_mergeable_kind
def test_a_model_that_was_merged_and_unmerged_can_be_moved_and_copied(kind: Kind, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder))
    wanted = _logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(_logits(copy.deepcopy(model)), wanted)
    for layer in _layers(model).values():  # what moving a bitsandbytes model of transformers to another device does
        layer.get_base_layer().to("cpu")
    assert torch.equal(_logits(model), wanted)


@every_mergeable_kind
def test_bytes_kept_for_an_exact_return_are_at_most_those_of_the_stored_weight(kind: Kind, base_folder: Path) -> None:
    layer = _adapted(kind.load(base_folder)).base_model.model.model.layers[0].mlp.down_proj
    layer.merge()
    weight = layer.get_base_layer().weight
    stored = weight.qdata.nbytes if hasattr(weight, "qdata") else weight.data.nbytes
    assert 0 < layer.unmerge_bytes <= stored * 1.1  # and scales


@every_mergeable_kind
def test_without_an_exact_return_nothing_is_kept(kind: Kind, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder))
    model.base_model.set_exact_unmerge("never")
    before = {name: _dense(layer) for name, layer in _layers(model).items()}
    model.merge_adapter()
    assert {layer.unmerge_bytes for layer in _layers(model).values()} == {0}
    model.unmerge_adapter()
    for name, layer in _layers(model).items():
        # Two roundings to the format, the first one turned back by the inverse of R.
        stretch = torch.linalg.matrix_norm(torch.linalg.inv(layer.get_delta_weight("first")), float("inf")).item()
        wanted = layer.get_delta_weight("first") @ before[name]
        bound = (_half_steps(kind, wanted).max() * stretch + _half_steps(kind, before[name]).max()) * 1.5
        assert (_dense(layer) - before[name]).abs().max() <= bound


@every_mergeable_kind_with_its_bits
def test_merge_and_unload_gives_a_model_of_quantised_layers(kind: Kind, base_folder: Path, tmp_path: Path) -> None:
    base = kind.load(base_folder)
    kinds = {name: type(module) for name, module in base.named_modules()}
    model = _adapted(base)
    model.merge_adapter()
    merged = _logits(model)
    model.unmerge_adapter()
    whole = model.merge_and_unload(safe_merge=True)
    assert {name: type(module) for name, module in whole.named_modules()} == kinds
    whole.save_pretrained(tmp_path)  # before any forward: bitsandbytes cannot save scales that it has repacked
    assert torch.equal(_logits(whole), merged)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    assert torch.equal(_logits(again), merged)


@every_mergeable_kind_with_its_bits
def test_a_safe_merge_that_refuses_changes_nothing(kind: Kind, base_folder: Path) -> None:
    model = _adapted(kind.load(base_folder))
    layers = _layers(model)
    stored = {name: _stored(layer) for name, layer in layers.items()}
    last = list(layers.values())[-1]
    with torch.no_grad():
        last.road_alpha["first"][3] = float("inf")
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(
            MergeError, match=r"NaNs detected in the merged weights. The adapter first seems to be broken"
        ):
            merge()
        assert not any(layer.merged for layer in layers.values())
        assert _layers(model).keys() == layers.keys()
        assert all(torch.equal(a, b) for n in layers for a, b in zip(stored[n], _stored(layers[n]), strict=True))


@every_mergeable_kind_with_its_bits
def test_a_backend_that_fails_in_the_middle_changes_nothing(
    kind: Kind, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted(kind.load(base_folder))
    wanted = _logits(model)
    layers = _layers(model)
    stored = {name: _stored(layer) for name, layer in layers.items()}
    last = list(layers.values())[-1]
    store = last.quantization_backend.set_base_weight

    def fail(layer: Any, weight: Tensor) -> None:
        store(layer, weight)
        raise MemoryError("no room")

    monkeypatch.setattr(last.quantization_backend, "set_base_weight", fail, raising=True)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers.values())
    assert all(torch.equal(a, b) for n in layers for a, b in zip(stored[n], _stored(layers[n]), strict=True))
    assert torch.equal(_logits(model), wanted)


def _bare_layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bnb8":
        return bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    if name == "bnb4":
        return bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    by_hand = nn.Sequential(nn.Linear(64, 32))
    quantize_(by_hand, Int8WeightOnlyConfig())
    return by_hand[0]


@pytest.mark.parametrize("name", ["bnb8", "bnb4", pytest.param("torchao", marks=needs_torchao)])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_bare_layer_with_a_bias(name: str, variant: str) -> None:
    base = nn.Sequential(_bare_layer(name)).eval()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain = base(x).detach()
    model = _adapted(base, target_modules=["0"], task_type=None, group_size=8, variant=variant)
    layer = next(iter(_layers(model).values()))
    with torch.no_grad():
        got = model(x)
        torch.testing.assert_close(got, plain @ layer.get_delta_weight("first").T, rtol=1e-5, atol=1e-5)
        mixed = model(x, adapter_names=["first", "second", "__base__", "second", "first"])
        both = [plain @ layer.get_delta_weight(adapter).T for adapter in NAMES]
    wanted = torch.stack([both[0][0], both[1][1], plain[2], both[1][3], both[0][4]])
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bnb8", "bnb4"])
def test_a_bias_is_merged_and_unmerged_with_the_quantised_weight(name: str) -> None:
    model = _adapted(nn.Sequential(_bare_layer(name)), target_modules=["0"], task_type=None, group_size=8)
    layer = next(iter(_layers(model).values()))
    bias = layer.get_base_layer().bias.detach().clone()
    stored = _stored(layer)
    layer.merge(safe_merge=True)
    wanted = layer.get_delta_weight("first") @ bias
    torch.testing.assert_close(layer.get_base_layer().bias, wanted, rtol=1e-5, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().bias, bias, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(stored, _stored(layer), strict=True))


@pytest.mark.parametrize("name", ["bnb8", "bnb4"])
def test_a_half_precision_bias_comes_back_bit_for_bit(name: str) -> None:
    base = nn.Sequential(_bare_layer(name))
    base[0].bias = nn.Parameter(base[0].bias.detach().bfloat16(), requires_grad=False)
    model = _adapted(base, target_modules=["0"], task_type=None, group_size=8)
    layer = next(iter(_layers(model).values()))
    bias = layer.get_base_layer().bias.detach().clone()
    for _ in range(5):
        layer.merge()
        assert not torch.equal(layer.get_base_layer().bias, bias)
        layer.unmerge()
    assert layer.get_base_layer().bias.dtype == torch.bfloat16
    assert torch.equal(layer.get_base_layer().bias, bias)


def test_a_4bit_weight_packed_for_the_cpu_is_merged_right() -> None:
    """On CPUs with avx512_bf16 bitsandbytes repacks a weight at the first forward in evaluation mode, in place."""
    model = _adapted(nn.Sequential(_bare_layer("bnb4")), target_modules=["0"], task_type=None, group_size=8)
    layer = next(iter(_layers(model).values()))
    wanted = layer.get_delta_weight("first") @ _dense(layer)
    weight = layer.get_base_layer().weight
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    packed = weight.data.clone()
    layer.merge()
    bound = _half_steps(KINDS[1], wanted) + 2.0**-7 * wanted.abs().max()  # packing rounds the scales to bfloat16
    assert bool(((_dense(layer) - wanted).abs() <= bound).all())
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight.data, packed)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double quantised"])
def test_the_scales_of_a_4bit_weight_packed_for_the_cpu_are_read_right(nested: bool) -> None:
    """The rows differ in size, so that a scale read in another's place is seen."""
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 64)[:, None]
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    linear.weight = bitsandbytes.nn.Params4bit(dense, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    model = _adapted(nn.Sequential(linear.to("cpu")), target_modules=["0"], task_type=None, group_size=8)
    layer = next(iter(_layers(model).values()))
    wanted, weight = _dense(layer), layer.get_base_layer().weight
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    read = layer._base_weight()._dense()
    assert read.dtype == wanted.dtype
    assert bool(((read - wanted).abs() <= 2.0**-8 * wanted.abs()).all())  # packing rounds the scales to bfloat16


@needs_torchao
@needs_torchao_018
@pytest.mark.parametrize("name", ["by hand", "gptq"])
def test_what_cannot_be_merged_is_refused_and_works_on(name: str) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    model = _adapted(nn.Sequential(_bare_layer("torchao")), target_modules=["0"], task_type=None, group_size=8)
    layer = next(iter(_layers(model).values()))
    if name == "gptq":
        layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    wanted, stored = model(x), _stored(layer)
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True), model.merge_and_unload):
        with pytest.raises(
            MergeError,
            match=r"its quantisation backend cannot store a changed weight, so nothing can be merged into it; "
            r"keep the adapter unmerged, or merge into an unquantised model",
        ) as caught:
            merge()
        expected = "got a gptq layer" if name == "gptq" else "got a torchao .quantised without a transformers"
        caught.match(expected)
        assert not layer.merged
        assert next(iter(_layers(model).values())) is layer
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(a, b) for a, b in zip(stored, _stored(layer), strict=True))


@every_trainable_kind_with_its_bits
def test_prepare_model_for_kbit_training(kind: Kind, base_folder: Path) -> None:
    base = prepare_model_for_kbit_training(kind.load(base_folder, torch.bfloat16), use_gradient_checkpointing=True)
    assert base.is_gradient_checkpointing
    model = roadie.get_peft_model(base, roadie.RoadConfig(**SETTINGS)).train()
    stored = {name: _stored(layer) for name, layer in _layers(model).items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {name for name, _ in model.named_parameters() if ".road_" in name}
    optimizer = torch.optim.AdamW(trainable.values(), lr=3e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in trainable.items() if "theta" in n)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(
        torch.equal(a, b) for n, layer in _layers(model).items() for a, b in zip(stored[n], _stored(layer), strict=True)
    )


@every_trainable_kind
def test_a_mixed_batch_in_training_with_checkpointing_on_a_prepared_model(kind: Kind, base_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(kind.load(base_folder), use_gradient_checkpointing=checkpointing)
        model = _adapted(base).train()
        road = {n: p.requires_grad_(True) for n, p in model.named_parameters() if ".road_" in n}
        model(IDS, adapter_names=ROWS).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in road.items()})
    plain, checkpointed = gradients
    assert all(g.abs().max() > 0 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())
