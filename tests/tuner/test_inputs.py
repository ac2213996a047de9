"""Adapters that rotate the inputs of layers too (`input_stages`), in a PEFT model: what they compute, cost and leave alone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.kernels.cases import no_compiled_kernel
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation
from tests.laws.rotations import ROOM, apply_dense
from torch import Tensor, nn

import roadie
from roadie import checkpoint
from roadie.bank.live import live_adapter
from roadie.errors import CheckpointError, ConfigError, MergeError, RoutingError
from roadie.rotation import rotate
from roadie.testing import randomise, tiny_llama
from roadie.testing.accuracy import assert_same_bits
from roadie.tuner import RoadInput

BOTH = ["first", "second"]
VARIANTS = ("road_1", "road_2", "road_4")
IDS = torch.arange(3 * 6).reshape(3, 6) * 7 % 128

pytestmark = pytest.mark.filterwarnings("ignore:this adapter has")


def config(**settings: Any) -> roadie.RoadConfig:
    size = {} if "stages" in settings else {"group_size": 4}
    return roadie.RoadConfig(**{"variant": "road_2", "input_stages": [8], "target_modules": BOTH, **size, **settings})


def adapted(*, dtype: torch.dtype = torch.float32, conv1d: bool = False, **settings: Any) -> Any:
    return roadie.get_peft_model(linear_chain(8, 16, 16, dtype=dtype, conv1d=conv1d), config(**settings))


def llama(*, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Three adapters: "default" and "other" rotate inputs, "plain" does not; predictions far from uniform."""
    common = {"target_modules": "all-linear", "group_size": 16, "task_type": "CAUSAL_LM"}
    model = roadie.get_peft_model(
        tiny_llama(initializer_range=0.2, dtype=dtype), config(**{**common, "input_stages": [64], **settings})
    )
    model.add_adapter("other", config(**{**common, "variant": "road_1", "input_stages": [2, 16]}))
    model.add_adapter("plain", config(**{**common, "input_stages": None}))
    return randomise(model, scale=0.2)


def x_of(dtype: torch.dtype = torch.float32, rows: int = 3, width: int = 8) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer_of(model: Any, name: str = "second") -> Any:
    return model.base_model.model.get_submodule(name)


def given_to(layer: Any, call: Callable[[], Any]) -> Tensor:
    """What the base layer is given in a call."""
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = layer.base_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        try:
            call()
        finally:
            handle.remove()
    return seen[0]


# What it is.


@pytest.mark.parametrize(("variant", "size"), [("road_1", 4), ("road_2", 8), ("road_4", 16)])
def test_an_input_starts_as_the_identity_with_parameters_of_its_own_width(variant: str, size: int) -> None:
    model = adapted(variant=variant, input_stages=[2, 8])
    x = x_of()
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(model(x), plain)
    road_input = layer_of(model, "first").road_input
    assert isinstance(road_input, RoadInput)
    assert isinstance(road_input, roadie.RoadLayer)
    assert road_input.road_theta["default"].shape == road_input.road_alpha["default"].shape == (2 * size,)
    assert (road_input.variant["default"], road_input.stages["default"]) == (variant, (2, 8))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "first" in name}
    path = "base_model.model.first"
    sites = (path, f"{path}.road_input")
    assert names == {f"{site}.road_{part}.default" for site in sites for part in ("theta", "alpha")}


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("settings", [{}, {"stages": [2, 16], "input_stages": [4, 8]}], ids=["one", "in a row"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_is_the_product_of_dense_matrices(variant: str, settings: dict[str, Any], conv1d: bool) -> None:
    """Written out in float64 from the paper's formulas, without a line of what computes it."""
    model = adapted(variant=variant, conv1d=conv1d, dtype=torch.float64, **settings).double()
    layer = layer_of(randomise(model), "first")
    base = layer.base_layer
    weight = (base.weight.detach().T if conv1d else base.weight.detach()).clone()

    def product(site: Any, sizes: Sequence[int]) -> Tensor:
        parts = zip(
            *(site.get_parameter(f"road_{p}.default").chunk(len(sizes)) for p in ("theta", "alpha")), sizes, strict=True
        )
        whole = torch.eye(site.out_features, dtype=torch.float64)
        for theta, alpha, size in parts:
            whole = dense_rotation(theta.detach(), alpha.detach(), variant, size) @ whole
        return whole

    outer = product(layer, settings.get("stages", [4]))
    inner = product(layer.road_input, settings.get("input_stages", [8]))
    x = x_of(torch.float64)
    wanted = (x @ inner.T @ weight.T + base.bias.detach()) @ outer.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.road_input.get_delta_weight("default"), inner, rtol=1e-13, atol=1e-13)
    layer.merge()
    merged = base.weight.detach().T if conv1d else base.weight.detach()
    torch.testing.assert_close(merged, outer @ weight @ inner, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-13, atol=1e-13)


def test_two_adapters_lie_around_each_other_and_merge_in_any_number_of_calls() -> None:
    model = adapted(dtype=torch.float64).double()
    model.add_adapter("outer", config(variant="road_4", stages=[2, 16], input_stages=[2, 8]))
    model = randomise(model.double())
    layer = layer_of(model, "first")
    inner_in, outer_in = (layer.road_input.get_delta_weight(name) for name in ("default", "outer"))
    inner_out, outer_out = (layer.get_delta_weight(name) for name in ("default", "outer"))
    wanted = outer_out @ inner_out @ layer.base_layer.weight.detach() @ inner_in @ outer_in
    for calls in ([["default", "outer"]], [["default"], ["outer"]]):
        for names in calls:
            layer.merge(adapter_names=names)
        torch.testing.assert_close(layer.base_layer.weight.detach(), wanted, rtol=1e-12, atol=1e-12)
        assert layer.road_input.merged_adapters == layer.merged_adapters == ["default", "outer"]
        layer.unmerge()
    x = x_of(torch.float64)
    model.base_model.set_adapter(["default", "outer"])
    torch.testing.assert_close(layer(x), x @ wanted.T + layer.base_layer.bias @ (outer_out @ inner_out).T)


# The input is not ours.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [None, ["default", "plain", "__base__"]], ids=["plain batch", "mixed batch"])
def test_what_a_layer_is_given_is_never_written_to(rows: list[str] | None, grad: bool, dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    model.add_adapter("plain", config(input_stages=None))
    layer = layer_of(randomise(model), "first")
    x = x_of(dtype)
    before, version = x.clone(), x._version
    with torch.set_grad_enabled(grad):
        for _ in range(3):  # the first makes tables, the others use them
            layer(x, adapter_names=rows)
    assert_same_bits(x, before, "the input")
    assert x._version == version


def test_rows_whose_adapter_leaves_the_input_alone_pass_bit_for_bit() -> None:
    model = adapted(input_stages=[2, 8])
    model.add_adapter("plain", config(input_stages=None))
    model.add_adapter("one", config(input_stages=[4]))
    layer = layer_of(randomise(model), "first").eval()
    odd = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38])
    x = odd.expand(5, 8).contiguous()
    names = ["plain", "__base__", "default", "plain", "one"]
    for compiled in (False, True):
        run = torch.compile(model, backend="eager") if compiled else model
        with roadie.rows(model, names):
            given = given_to(layer, lambda run=run: run(x))  # type: ignore[misc]
        for row in (0, 1, 3):
            assert_same_bits(given[row], odd, f"row {row}")
        assert not torch.equal(given[2].nan_to_num(), odd.nan_to_num())
    blends: list[Any] = [{"plain": 0.5}, None, {"default": 0.5, "plain": 0.5}, "plain", {"one": 1.0}]
    given = given_to(layer, lambda: model(x, adapter_names=blends))
    for row in (0, 1, 3):
        assert_same_bits(given[row], odd, f"row {row} of blends")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_rotated_input_is_rounded_once_to_the_dtype_of_the_input(dtype: torch.dtype, train: bool) -> None:
    layer = layer_of(randomise(adapted(dtype=dtype, variant="road_4", input_stages=[2, 4, 8])), "first")
    x = x_of(dtype, rows=64)
    with torch.set_grad_enabled(train):
        z = layer(x)
        turned = rotate(x, *layer.road_input.rotations("default"))
        wanted = rotate(layer.base_layer(turned), *layer.rotations("default"))
    assert turned.dtype == z.dtype == dtype
    assert z.requires_grad is train
    assert_same_bits(z.detach(), wanted.detach(), "one rounding a rotation")


def test_under_autocast_the_input_keeps_its_dtype() -> None:
    layer = layer_of(randomise(adapted()), "first")
    x = x_of()
    with torch.autocast("cpu", torch.bfloat16):
        given = given_to(layer, lambda: layer(x))
        z = layer(x)
    assert given.dtype == torch.float32
    assert z.dtype == torch.bfloat16
    assert_same_bits(given, rotate(x, *layer.road_input.rotations("default")).detach(), "the rotated input")


# A layer without it is what it was.


def test_a_layer_whose_adapters_leave_inputs_alone_has_no_such_part() -> None:
    model = adapted(input_stages=None, input_stages_pattern={"second": [4, 8]})
    assert layer_of(model, "first").road_input is None
    assert "road_input" not in layer_of(model, "first")._modules
    assert layer_of(model, "second").road_input.stages == {"default": (4, 8)}


@pytest.mark.parametrize("inputs", [False, True])
def test_the_short_way_of_decoding_gives_the_same_bits_and_sees_changes(inputs: bool) -> None:
    model = randomise(adapted(input_stages=[8] if inputs else None, target_modules=["first"])).eval()
    layer = layer_of(model, "first")
    x = x_of(rows=1)
    with torch.no_grad():
        first = model(x)
        is_compiled = no_compiled_kernel() is None
        assert (layer._kept.last is not None) == is_compiled
        assert not inputs or (layer.road_input._kept.last is not None) == is_compiled
        assert_same_bits(model(x), first, "the short way")
        site = layer.road_input if inputs else layer
        site.road_theta["default"].data.mul_(0.5)
        changed = model(x)
        assert not torch.equal(changed, first)
        assert_same_bits(changed, copy.deepcopy(model)(x), "a copy, which remembers nothing")
        with model.disable_adapter():
            base = model(x)
        assert_same_bits(base, linear_chain(8, 16, 16)(x), "the base model")
    assert model(x).requires_grad
    model.add_adapter("more", config(target_modules=["first"]))
    randomise(model, adapter="more")
    with torch.no_grad():
        model(x)
        model.set_adapter("more")
        more = model(x)
        model.base_model.set_adapter(["default", "more"])
        both = model(x)
        model.set_adapter("default")
        assert_same_bits(model(x), changed, "the first adapter again")
    assert not torch.equal(more, changed)
    assert not torch.equal(both, changed)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"input_stages": []}, "wanted the group sizes of one or more"),
        ({"input_stages": "64"}, "wanted the group sizes of one or more"),
        ({"input_stages": [2, 7]}, "must be divisible by 2"),
        ({"input_stages_pattern": {"(": [2]}}, "input_stages_pattern, which is not a regular expression"),
        ({"input_stages_pattern": {"q": [3]}}, "must be divisible by 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        roadie.RoadConfig(**settings)


def test_a_size_that_does_not_divide_the_inputs_is_refused_or_adapted() -> None:
    base = linear_chain(8, 16, 16)
    says = r"in_features of the base layer must be divisible by group_size \(16\).*in_features=8; try group_size=8.*'first'"
    with pytest.raises(ConfigError, match=says):
        roadie.get_peft_model(base, config(input_stages=[2, 16]))
    assert type(base.first) is nn.Linear
    model = adapted(input_stages=[2, 16], adapt_group_size=True)
    assert layer_of(model, "first").road_input.stages["default"] == (2, 8)
    assert layer_of(model, "second").road_input.stages["default"] == (2, 16)


def test_a_pattern_without_a_module_is_told() -> None:
    with pytest.warns(RuntimeWarning, match=r"input_stages_pattern keys did not match any targeted module.*third"):
        adapted(input_stages_pattern={"third": [2]})


def test_pairs_of_inputs_are_no_share() -> None:
    says = "layer first: got adapter 'default', which rotates the layer's input"
    with pytest.raises(ConfigError, match=says), roadie.train_only(adapted(), "1/2"):
        pass


def test_rows_of_a_merged_model_are_refused() -> None:
    model = randomise(adapted())
    model.merge_adapter()
    with pytest.raises(RoutingError, match="unmerge_adapter"):
        model(x_of(), adapter_names=["default"] * 3)


# Gradients.


@pytest.mark.parametrize("names", [None, ["default", "other", "plain", "__base__"]], ids=["plain batch", "mixed batch"])
@pytest.mark.parametrize("stages", [[8], [2, 8]], ids=["one", "in a row"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_gradients_are_those_of_differences_also_of_second_order(
    variant: str, stages: list[int], names: list[str] | None
) -> None:
    model = adapted(variant=variant, dtype=torch.float64, input_stages=stages)
    model.add_adapter("other", config(stages=[16, 4], input_stages=[8, 4]))
    model.add_adapter("plain", config(input_stages=None))
    model = randomise(model.double(), scale=0.3)
    used = ("default",) if names is None else ("default", "other", "plain")
    parameters = [p for n, p in sorted(model.named_parameters()) if ".road_" in n and n.endswith(used)]
    assert len(parameters) == (8 if names is None else 20)
    for parameter in parameters:
        parameter.requires_grad_(True)

    def output(x: Tensor, *_: Tensor) -> Tensor:
        result: Tensor = model(x) if names is None else model(x, adapter_names=names)
        return result

    inputs = (x_of(torch.float64, rows=4).requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


def test_backward_keeps_what_layers_are_given_once_however_many_they_are() -> None:
    model = randomise(
        roadie.get_peft_model(
            tiny_llama(num_hidden_layers=1),
            config(target_modules=["q_proj", "k_proj", "v_proj"], group_size=16, input_stages=[64]),
        )
    )
    attention = model.base_model.model.model.layers[0].self_attn
    kept: set[int] = set()
    x = torch.randn(2, 5, 64)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == x.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert x.data_ptr() in kept
    # road_2 keeps the input of the output's rotation, one tensor a layer; of the inputs one for all three.
    assert len(kept) == 1 + len(outputs)


@pytest.mark.parametrize("rows", [None, ["default", "plain", "other"]], ids=["plain batch", "mixed batch"])
def test_recomputed_blocks_give_the_same_gradients(rows: list[str] | None) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = llama().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".road_" in name)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, adapter_names=rows).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert any(".road_input." in name for name in plain)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert_same_bits(recomputed[name], gradient, name)


def test_training_lowers_the_loss_and_a_loaded_adapter_gives_the_same(tmp_path: Path) -> None:
    model = adapted(variant="road_1")
    x = x_of(rows=64)
    wanted = randomise(adapted(variant="road_1"), seed=7, scale=0.5)(x).detach()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(80):
        loss = (model(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    with pytest.warns(UserWarning, match=r"rotations of inputs \(input_stages\).*stock PEFT refuses it"):
        model.save_pretrained(tmp_path)
    again = roadie.PeftModel.from_pretrained(linear_chain(8, 16, 16), tmp_path)
    assert torch.equal(again(x), model(x))


# Rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mixed_batch_of_a_language_model_is_each_row_alone(
    dtype: torch.dtype, row_by_row: Callable[..., Tensor]
) -> None:
    model = llama(dtype=dtype).eval()
    for rows in (["default", "plain", "other"], ["plain", "__base__", "default"], ["plain", "plain", "__base__"]):
        with torch.no_grad():
            wanted = row_by_row(model, rows, lambda: model(input_ids=IDS).logits)
            assert torch.equal(model(input_ids=IDS, adapter_names=rows).logits, wanted)
            with roadie.rows(model, rows):
                assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_generation_with_beams_and_an_adapter_for_each_row(row_by_row: Callable[..., Tensor]) -> None:
    model = llama().eval()
    rows = ["default", "plain", "other"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "do_sample": False, "pad_token_id": 0}

    def generate(**more: Any) -> Tensor:
        result: Tensor = model.generate(input_ids=IDS, **settings, **more)
        return result

    wanted = row_by_row(model, rows, generate)
    assert torch.equal(generate(adapter_names=rows), wanted)
    assert not torch.equal(wanted, row_by_row(model, ["__base__"] * 3, generate))


def test_strengths_and_blends_are_powers_of_the_inputs_rotation_too() -> None:
    model = randomise(adapted(variant="road_1", dtype=torch.float64).double(), scale=0.2)
    layer = layer_of(model, "first").eval()
    theta, alpha = (layer.road_input.get_parameter(f"road_{part}.default").detach() for part in ("theta", "alpha"))
    half = dense_rotation(theta / 2, alpha.sqrt(), "road_1", 8)
    x = x_of(torch.float64)
    given = given_to(layer, lambda: model(x, adapter_names=[{"default": 0.5}, "default", None]))
    torch.testing.assert_close(given[0], x[0] @ half.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given[1], x[1] @ layer.road_input.get_delta_weight("default").T.detach())


def test_a_bank_takes_a_live_adapter_with_its_inputs() -> None:
    model = llama().eval()
    value = live_adapter(model, "default")
    assert value.input_stages == ((64,),)
    assert live_adapter(model, "plain").input_stages == ()
    with roadie.AdapterBank(tiny_llama(initializer_range=0.2).eval(), slots=3) as bank, torch.no_grad():
        for name in ("default", "other", "plain"):
            bank.admit(name, (model, name))
        rows = ["other", "plain", "default"]
        with bank.rows(rows):
            served = bank.model(IDS).logits
        wanted = model(input_ids=IDS, adapter_names=rows).logits
    torch.testing.assert_close(served, wanted, rtol=1e-5, atol=1e-5)


# Compiled.


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_and_gives_the_same_gradients() -> None:
    model = randomise(adapted())
    x = x_of()
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted, gradients = model(x), torch.autograd.grad(model(x).sin().sum(), trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), trained), gradients)


def test_a_compiled_model_takes_other_rows_without_compiling_again() -> None:
    model = randomise(adapted())
    model.add_adapter("plain", config(input_stages=None))
    model = randomise(model, adapter="plain").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = x_of()
    counter = torch._dynamo.utils.counters
    with torch.no_grad():
        for count, rows in enumerate((["default", "plain", "__base__"], ["plain", "default", "default"])):
            with roadie.rows(model, rows):
                got = compiled(x)
            torch.testing.assert_close(got, model(x, adapter_names=rows))
            if count == 0:
                graphs = counter["stats"]["unique_graphs"]
    assert counter["stats"]["unique_graphs"] == graphs


# Adding, removing, copying.


def test_adapters_with_and_without_inputs_come_and_go() -> None:
    model = randomise(adapted(input_stages=None))
    x = x_of()
    plain = model(x)
    layer = layer_of(model, "first")
    assert layer.road_input is None
    model.add_adapter("turned", config())
    randomise(model, adapter="turned")
    assert torch.equal(model(x), plain)
    model.set_adapter("turned")
    turned = model(x)
    assert not torch.equal(turned, plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.endswith(".turned")
    }
    model.delete_adapter("turned")
    assert layer.road_input is None
    assert not [name for name, _ in model.named_modules() if "road_input" in name]
    assert model.active_adapters == ["default"]
    assert torch.equal(model(x), plain)
    model.add_adapter("turned", config(input_stages=[2, 8]))
    model.set_adapter("turned")
    assert layer.road_input.stages == {"turned": (2, 8)}
    assert torch.equal(model(x), linear_chain(8, 16, 16)(x))


def test_deleting_one_of_several_leaves_the_others_and_the_active_one() -> None:
    model = randomise(adapted())
    model.add_adapter("other", config(input_stages=[2, 8]))
    model.add_adapter("plain", config(input_stages=None))
    model = randomise(model)
    x = x_of()
    model.set_adapter("plain")
    plain = model(x)
    model.set_adapter("default")
    model.delete_adapter("other")
    layer = layer_of(model, "first")
    assert list(layer.road_input.road_theta) == list(layer.road_input.variant) == ["default"]
    with pytest.warns(UserWarning, match="Setting active adapter to plain"):
        model.delete_adapter("default")
    assert layer.road_input is None
    assert torch.equal(model(x), plain)


def test_starting_an_adapter_anew_without_inputs_takes_its_rotation_away() -> None:
    layer = layer_of(randomise(adapted()), "first")
    layer.update_layer("default", config(input_stages=None))
    assert layer.road_input is None
    with pytest.raises(ConfigError, match="in_features"):
        layer.update_layer("default", config(input_stages=[64]))
    assert layer.road_input is None
    assert layer.group_size == {"default": 4}


@pytest.mark.parametrize("first", [[8], None], ids=["with inputs", "without"])
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    first: list[int] | None, portrait: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(adapted(input_stages=first))
    before = portrait(model)
    with pytest.raises(ConfigError, match="in_features"):
        model.add_adapter("bad", config(input_stages=[32]))
    assert portrait(model) == before
    monkeypatch.setattr("roadie.tuner.model.mark_shared_weights", lambda model: 1 / 0)  # when everything is in place
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("bad", config(input_stages=[2, 8]))
    assert portrait(model) == before


def test_switching_and_training_reach_the_inputs() -> None:
    model = randomise(adapted())
    layer = layer_of(model, "first")
    parameters = [layer.road_input.road_theta["default"], layer.road_input.road_alpha["default"]]
    for switch, trained in (
        (lambda: model.base_model.disable_adapter_layers(), False),
        (lambda: model.base_model.enable_adapter_layers(), True),
        (lambda: layer.set_requires_grad("default", False), False),
        (lambda: layer.set_requires_grad("default", True), True),
        (lambda: layer.enable_adapters(False), False),
        (lambda: layer.enable_adapters(True), True),
        (lambda: layer.set_adapter([]), False),
        (lambda: layer.set_adapter("default"), True),
        (lambda: layer.set_adapter("default", inference_mode=True), False),
    ):
        switch()
        assert {parameter.requires_grad for parameter in parameters} == {trained}
    assert layer.road_input.active_adapters == ["default"]


def test_pefts_view_of_the_model_is_regular() -> None:
    model = llama()
    for merged in ([], ["default"]):
        status = model.get_model_status()
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], merged)
        assert status.requires_grad == {"default": True, "other": False, "plain": False}
        model.merge_adapter()
    model.set_adapter("other")  # PEFT takes merges back first
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(how: Callable[[Any], Any]) -> None:
    model = randomise(adapted())
    x = x_of()
    with torch.no_grad():
        wanted = model(x)
        twin = how(model)
        assert torch.equal(twin(x), wanted)
        layer = layer_of(twin, "first")
        assert layer.road_input.base_layer is layer.base_layer
        assert layer.road_input._routing is layer._routing
        layer.road_input.road_theta["default"].add_(1)
        assert torch.equal(model(x), wanted)
        assert not torch.equal(twin(x), wanted)
    twin.merge_adapter()
    assert layer.road_input.merged_adapters == ["default"]
    assert not layer_of(model, "first").road_input.merged_adapters


def test_unloading_gives_plain_layers() -> None:
    model = llama().eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        plain = tiny_llama(initializer_range=0.2)(IDS).logits
        whole = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(whole(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(copy.deepcopy(model).unload()(IDS).logits, plain)
    assert not [module for module in whole.modules() if isinstance(module, roadie.RoadLayer)]
    assert not [name for name in whole.state_dict() if "road_" in name]


def test_a_merge_that_would_not_be_finite_changes_nothing(portrait: Callable[[nn.Module], Any]) -> None:
    model = randomise(adapted())
    layer_of(model, "second").road_input.road_alpha["default"].data[0] = torch.inf
    before = portrait(model)
    with pytest.raises(MergeError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert portrait(model) == before


def test_a_singular_rotation_of_an_input_cannot_be_unmerged() -> None:
    layer = layer_of(randomise(adapted()), "first")
    layer.road_input.road_alpha["default"].data.zero_()
    layer.merge()
    with pytest.raises(MergeError, match="singular block"):
        layer.unmerge()


def test_a_merge_that_stops_in_the_middle_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from roadie.tuner import merging

    model = randomise(adapted(dtype=torch.bfloat16))
    layer = layer_of(model, "first")
    before = [tensor.detach().clone() for tensor in (layer.base_layer.weight, layer.base_layer.bias)]
    rotated, calls = merging.rotated_rows, 0

    def failing(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return rotated(*arguments)

    monkeypatch.setattr(merging, "ELEMENTS_A_PIECE", 32)  # four rows of eight
    monkeypatch.setattr(merging, "rotated_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        layer.merge()
    monkeypatch.undo()
    for tensor, wanted in zip((layer.base_layer.weight, layer.base_layer.bias), before, strict=True):
        assert_same_bits(tensor.detach(), wanted, "as it was")
    assert not layer.merged


# Files.


def test_it_is_loaded_beside_others_and_each_is_saved_alone(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    folders = {"default": tmp_path, "other": tmp_path / "other", "plain": tmp_path / "plain"}
    values = {name: checkpoint.load(folder) for name, folder in folders.items()}
    assert {name: value.input_stages for name, value in values.items()} == {
        "default": ((64,),),
        "other": ((2, 16),),
        "plain": (),
    }
    base = tiny_llama(initializer_range=0.2)
    again = roadie.PeftModel.from_pretrained(base, folders["plain"], adapter_name="plain")
    for name in ("default", "other"):
        again.load_adapter(folders[name], name, low_cpu_mem_usage=name == "other")
    rows = ["plain", "other", "default"]
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS, adapter_names=rows).logits
        assert torch.equal(again.eval()(input_ids=IDS, adapter_names=rows).logits, wanted)


def test_a_file_of_another_base_model_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    base = linear_chain(16, 16, 16)
    with pytest.raises(
        CheckpointError, match=r"got 8 parameters for 'first.road_input'.*wanted 16 for.*in_features=16"
    ):
        roadie.PeftModel.from_pretrained(base, tmp_path)
    assert type(base.first) is nn.Linear


def test_a_file_without_the_inputs_its_config_speaks_of_is_refused(tmp_path: Path) -> None:
    adapted(input_stages=None).save_pretrained(tmp_path)
    file = tmp_path / checkpoint.CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "input_stages": [8]}))
    base = linear_chain(8, 16, 16)
    with pytest.raises(CheckpointError, match="got nothing, and a config with input_stages for this layer"):
        roadie.PeftModel.from_pretrained(base, tmp_path)
    assert type(base.first) is nn.Linear


def test_values_of_an_input_are_checked_before_they_are_copied() -> None:
    model = adapted()
    state = peft.get_peft_model_state_dict(model)
    assert "base_model.model.first.road_input.road_theta" in state
    state["base_model.model.first.road_input.road_theta"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"non-finite values in .*first\.road_input\.road_theta"):
        peft.set_peft_model_state_dict(model, state)


def test_a_state_dict_says_which_layers_are_adapted() -> None:
    model = adapted(target_modules=["first"])
    base = linear_chain(8, 16, 16)
    saved = peft.get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        twin = peft.inject_adapter_in_model(config(), base, state_dict=state)
    assert {path for path, module in twin.named_modules() if isinstance(module, roadie.RoadLayer)} == {
        "first",
        "first.road_input",
    }


# Together with others.


@pytest.mark.parametrize("how", ["blend", "compose"])
def test_adapters_are_combined_with_their_inputs(how: str) -> None:
    model = adapted(variant="road_1", dtype=torch.float64).double()
    model.add_adapter("other", config(variant="road_1"))
    model = randomise(model.double(), scale=0.2)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=how)
    layer = layer_of(model, "first")
    turns = [layer.road_input.rotation(name) for name in ("default", "other", "both")]
    complex_ = [torch.complex(turn.direct, turn.cross) for turn in turns]
    wanted = (complex_[0] * complex_[1]).sqrt()  # road_1 blocks commute
    torch.testing.assert_close(complex_[2], wanted, rtol=1e-9, atol=1e-9)


def test_composed_adapters_are_both_active_one_after_the_other() -> None:
    model = adapted(variant="road_4", dtype=torch.float64).double()
    model.add_adapter("other", config(variant="road_2"))
    model.add_adapter("plain", config(variant="road_2", input_stages=None))
    model = randomise(model.double(), scale=0.2)
    x = x_of(torch.float64)
    for names in (["default", "other"], ["plain", "default"]):
        model.add_weighted_adapter(names, [1.0, 1.0], "product", combination_type="compose")
        model.base_model.set_adapter(names)
        with torch.no_grad():
            wanted = model(x)
            model.set_adapter("product")
            torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
        model.set_adapter("default")
        model.delete_adapter("product")


def test_lora_around_the_layer_sees_the_input_as_it_is(tmp_path: Path) -> None:
    model = roadie.get_peft_model(linear_chain(8, 16, 16, dtype=torch.float64), config(target_modules=["first"]))
    roadie.add_lora(model, peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), "lora")
    model = randomise(model.double())
    around = layer_of(model, "first")
    road = around.base_layer
    x = x_of(torch.float64)
    up, down = around.lora_B["lora"].weight, around.lora_A["lora"].weight
    outer, inner = road.get_delta_weight("default"), road.road_input.get_delta_weight("default")
    weight = outer @ road.base_layer.weight @ inner
    scale = around.scaling["lora"]
    wanted = x @ (weight + scale * up @ down).T + outer @ road.base_layer.bias
    torch.testing.assert_close(around(x), wanted)
    before = road.base_layer.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(around(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(road.base_layer.weight.detach(), before)
    with roadie.lora_rows(model, ["lora", None, "lora"]):
        mixed = around(x)
    torch.testing.assert_close(mixed[0], wanted[0])
    torch.testing.assert_close(mixed[1], (x @ weight.T + outer @ road.base_layer.bias)[1])
    roadie.save_together(model, tmp_path)
    again = roadie.load_together(linear_chain(8, 16, 16, dtype=torch.float64), tmp_path)
    torch.testing.assert_close(layer_of(again, "first")(x), wanted)


@pytest.mark.parametrize("name", ["bnb8", "bnb4"])
def test_a_quantised_layer_is_merged_within_half_a_step(name: str) -> None:
    """Storing a weight moves each element by at most half a step of its format."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layers = bitsandbytes.nn
    torch.manual_seed(0)
    if name == "bnb8":
        base = layers.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0)
    else:
        base = layers.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
    base.load_state_dict(nn.Linear(64, 64).state_dict())
    model = nn.Sequential()
    model.add_module("first", base.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = name == "bnb8", name == "bnb4"
    model = randomise(roadie.get_peft_model(model, config(target_modules=["first"], group_size=16, input_stages=[64])))
    layer = layer_of(model, "first")
    dense = layer.quantization_backend.get_base_weight(layer.base_layer).detach().double()
    outer, inner = (site.get_delta_weight("default").detach().double() for site in (layer, layer.road_input))
    bias = layer.base_layer.bias.detach().clone()
    layer.merge()
    wanted = outer @ dense @ inner
    merged = layer.quantization_backend.get_base_weight(layer.base_layer).detach().double()
    largest = wanted.abs().amax(1, keepdim=True)
    if name == "bnb8":
        half_step = largest * (0.5 / 127 + 2.0**-11)
    else:
        codes = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        half_step = largest * codes.sort().values.diff().max() / 2
    assert bool(((merged - wanted).abs() <= half_step * ROOM + 1e-6).all())
    torch.testing.assert_close(layer.base_layer.bias.detach(), apply_dense(bias, [outer]).float())
    layer.unmerge()
    back = layer.quantization_backend.get_base_weight(layer.base_layer).detach().double()
    assert torch.equal(back, dense)
