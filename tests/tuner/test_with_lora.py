"""RoAd together with LoRA: ``z = (R W + B A) x``, against dense matrices in float64, and the laws of adapters for both."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.gradients import collect_gradients
from tests.laws.bounds import assert_within, wide
from tests.laws.reference import dense_rotation
from tests.laws.rotations import ROOM
from tests.laws.tuner import ORDER_OF_SUMS
from tests.versions import needs_trainer_to_resume_several_adapters
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import roadie
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.errors import CheckpointError, ConfigError, MergeError, RoutingError, UnsupportedLayer
from roadie.testing import tiny_llama
from roadie.testing.accuracy import assert_same_bits, smallest_step, unit_roundoff
from roadie.tuner.with_lora import WithLora, lora_of, without_lora, without_road
from roadie.tuner.with_lora.layer import LoraLinear

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA_TARGETS = ["q_proj", "up_proj", "down_proj"]  # some layers of both, some of one kind alone


class Two(nn.Module):
    """Two linear layers with biases: small enough to be written out as dense matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def road_config(**settings: Any) -> roadie.RoadConfig:
    return roadie.RoadConfig(**{"variant": "road_2", "group_size": 4, "init_weights": False, **settings})


def lora_config(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False, **settings})


def two(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Two adapters of each kind on both layers; "default" and "lora" are active."""
    torch.manual_seed(0)
    both = ["first", "second"]
    model = roadie.get_peft_model(Two().to(dtype), road_config(target_modules=both))
    roadie.add_lora(model, lora_config(target_modules=both, **settings))
    model.add_adapter("other", road_config(target_modules=both, variant="road_1", group_size=8))
    model.add_adapter("fr", lora_config(target_modules=both, r=3))
    if dtype == torch.float64:
        model.to(dtype)
    return model


def llama(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = road_config(target_modules=TARGETS, group_size=8, task_type="CAUSAL_LM")
    model = roadie.get_peft_model(tiny_llama(initializer_range=0.2), config)
    return roadie.add_lora(model, lora_config(target_modules=LORA_TARGETS, **lora))


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, 50, (rows, 6), generator=torch.Generator().manual_seed(1))


def dense(layer: LoraLinear, x: Tensor, road: str | None, lora: str | None) -> Tensor:
    """``R (W x + b) + s B A x`` of one layer, from matrices; differentiable in nothing."""
    inner: Any = layer.road
    y = nn.functional.linear(x, layer.get_base_layer().weight, layer.get_base_layer().bias)
    if road is not None:
        matrix = dense_rotation(
            inner.road_theta[road].detach(),
            inner.road_alpha[road].detach(),
            inner.variant[road],
            inner.group_size[road],
        )
        y = y @ matrix.T
    if lora is not None:
        scale = layer.lora_alpha[lora] / layer.r[lora]
        y = y + scale * x @ layer.lora_A[lora].weight.T @ layer.lora_B[lora].weight.T
    return y


def through_matrices(model: Any, x: Tensor, road: str | None, lora: str | None) -> Tensor:
    base = model.get_base_model()
    with torch.no_grad():
        return dense(base.second, torch.tanh(dense(base.first, x, road, lora)), road, lora)


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@contextmanager
def chosen(model: Any, road: str | None, lora: str | None) -> Iterator[None]:
    """One adapter of each kind, or none of it, for all rows, without any mixing."""
    with_road, with_lora = model.active_adapter, lora_of(model).active_adapter
    if road is not None:
        model.set_adapter(road)
    if lora is not None:
        model.set_adapter(lora)
    try:
        if road is None and lora is None:
            with model.disable_adapter():
                yield
        elif road is None:
            with without_road(model):
                yield
        elif lora is None:
            with without_lora(model):
                yield
        else:
            yield
    finally:
        model.set_adapter(with_road)
        lora_of(model).set_adapter(with_lora)


ROWS = [("default", "lora"), ("other", "fr"), ("default", None), (None, "fr"), (None, None), ("other", "lora")]


# The formula


@pytest.mark.parametrize(("road", "lora"), ROWS)
def test_lora_is_added_to_the_rotated_output_and_not_rotated(road: str | None, lora: str | None) -> None:
    model, x = two(), inputs()
    with chosen(model, road, lora):
        got = model(x)
    torch.testing.assert_close(got, through_matrices(model, x, road, lora), rtol=0, atol=ORDER_OF_SUMS)


def test_where_the_kinds_adapt_different_layers_each_does_its_own() -> None:
    torch.manual_seed(0)
    base = Two().double()
    plain = copy.deepcopy(base)
    model = roadie.get_peft_model(base, road_config(target_modules=["first"]))
    roadie.add_lora(model, lora_config(target_modules=["second"])).double()
    x = inputs()
    with torch.no_grad():
        hidden = torch.tanh(base.first(x))
        second: Any = base.second
        scale = second.lora_alpha["lora"] / second.r["lora"]
        added = scale * hidden @ second.lora_A["lora"].weight.T @ second.lora_B["lora"].weight.T
        torch.testing.assert_close(model(x), plain.second(hidden) + added, rtol=0, atol=ORDER_OF_SUMS)


def test_a_road_adapter_added_later_lies_inside() -> None:
    torch.manual_seed(0)
    model = roadie.get_peft_model(Two().double(), road_config(target_modules=["first"]))
    roadie.add_lora(model, lora_config(target_modules=["first", "second"]))
    model.add_adapter("later", road_config(target_modules=["first", "second"]))
    model.double().set_adapter("later")
    x = inputs()
    torch.testing.assert_close(model(x), through_matrices(model, x, "later", "lora"), rtol=0, atol=ORDER_OF_SUMS)


# Training


def test_both_kinds_are_trained_and_nothing_else() -> None:
    trained = {name for name, parameter in llama().named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".road_" in name or ".lora_" in name for name in trained)
    assert any(".road_theta" in name for name in trained)
    assert any(".lora_A" in name for name in trained)


def test_gradients_of_both_kinds_are_the_differences() -> None:
    model, x = two(), inputs()
    parameters = [p for name, p in model.named_parameters() if p.requires_grad]
    assert len(parameters) == 8

    def loss(*values: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradcheck(loss, parameters, eps=1e-6, atol=1e-6)


def test_gradients_of_mixed_rows_go_to_their_own_adapters() -> None:
    model, x = two(), inputs(len(ROWS))
    for parameter in road_and_lora(model):
        parameter.requires_grad_(True)
    whole = gradients(model, lambda: mixed(model, x).square().sum())
    one_by_one: dict[str, Tensor] = {}
    for index, (road, lora) in enumerate(ROWS):
        with chosen(model, road, lora):
            for parameter in road_and_lora(model):
                parameter.requires_grad_(True)
            if road is None and lora is None:
                continue
            row = gradients(model, lambda at=index: model(x[at : at + 1]).square().sum())
        for name, grad in row.items():
            one_by_one[name] = one_by_one.get(name, torch.zeros_like(grad)) + grad
    assert whole.keys() == one_by_one.keys()
    assert len(whole) == 16
    for name, grad in whole.items():
        torch.testing.assert_close(grad, one_by_one[name], rtol=0, atol=ORDER_OF_SUMS)


def test_rows_of_lora_leave_alone_what_road_1_keeps_for_backward() -> None:
    model, x = two(), inputs()
    model.set_adapter("other")  # road_1 keeps its output
    parameters = [parameter for name, parameter in model.named_parameters() if name.endswith(".other")]
    with roadie.lora_rows(model, ["lora", None, "fr", "lora"]):
        assert torch.autograd.gradcheck(lambda *_: model(x), parameters, eps=1e-6, atol=1e-6)


def road_and_lora(model: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".road_" in name or ".lora_" in name]


def gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def mixed(model: Any, x: Tensor, rows: Sequence[tuple[str | None, str | None]] = tuple(ROWS)) -> Tensor:
    with roadie.rows(model, [road for road, _ in rows]), roadie.lora_rows(model, [lora for _, lora in rows]):
        return model(x)


def test_checkpointed_activations_get_their_rows_back() -> None:
    model = llama()
    model.add_adapter("fr", lora_config(target_modules=LORA_TARGETS))
    model.set_adapter("fr")
    for parameter in road_and_lora(model):
        parameter.requires_grad_(True)
    model.train()
    rows, ids = ["lora", None, "fr"], tokens()

    def loss() -> Tensor:
        with roadie.rows(model, ["default", "default", None]), roadie.lora_rows(model, rows):
            return model(input_ids=ids, labels=ids).loss

    plain = gradients(model, loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, loss)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert_same_bits(again[name], grad, name)


@needs_trainer_to_resume_several_adapters
def test_a_step_of_the_trainer_moves_both_and_resumes_from_both(tmp_path: Path) -> None:
    ids = tokens(4)
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, seed=0, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data)

    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, 4).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    resumed = llama()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, wanted), got in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert_same_bits(got.detach(), wanted.detach(), name)


# Rows


def test_a_mixed_batch_is_its_rows_one_by_one() -> None:
    model, x = two(), inputs(len(ROWS))
    alone = [through_matrices(model, x[i : i + 1], road, lora) for i, (road, lora) in enumerate(ROWS)]
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(mixed(model, x), torch.cat(alone), rtol=0, atol=ORDER_OF_SUMS)
    with torch.no_grad():
        torch.testing.assert_close(mixed(model, x), torch.cat(alone), rtol=0, atol=ORDER_OF_SUMS)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_rows_of_both_kinds_is_generating_alone(beams: int) -> None:
    model = llama()
    model.add_adapter("other", road_config(target_modules=TARGETS, variant="road_1", group_size=8))
    model.add_adapter("fr", lora_config(target_modules=LORA_TARGETS))
    model.eval()
    ids, rows = tokens(4), [("default", "lora"), ("other", "fr"), ("other", None), (None, "lora")]
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with roadie.lora_rows(model, [lora for _, lora in rows], expansion=beams):
        got = model.generate(input_ids=ids, adapter_names=[road or "__base__" for road, _ in rows], **settings)
    for index, (road, lora) in enumerate(rows):
        with chosen(model, road, lora):
            alone = model.generate(input_ids=ids[index : index + 1], **settings)
        assert torch.equal(got[index : index + 1], alone), (road, lora)
    assert len({tuple(row.tolist()[6:]) for row in got}) > 1


def test_a_choice_of_rows_ends_with_its_block_also_where_it_raises() -> None:
    model, x = two(), inputs()
    plain = model(x)
    with pytest.raises(RoutingError, match="one for each row"), roadie.lora_rows(model, ["fr"] * 3):
        model(x)
    assert torch.equal(model(x), plain)
    for names, what in ((["gone"] * 4, "gone"), ("lora", "sequence")):
        with pytest.raises(RoutingError, match=what), roadie.lora_rows(model, names):
            pass
    model.merge_adapter()
    with pytest.raises(RoutingError, match="unmerge_adapter"), roadie.lora_rows(model, ["lora"] * 4):
        pass


@pytest.mark.parametrize("trains", [False, True])
def test_a_bank_over_a_plain_lora_model_gives_the_formula_too(trains: bool) -> None:
    torch.manual_seed(0)
    both = ["first", "second"]
    model, x = two(), inputs()
    adapters = {name: roadie.Adapter(_layers(model, name)) for name in ("default", "other")}
    plain = peft.get_peft_model(copy.deepcopy(_base_of(model)), lora_config(target_modules=both)).double()
    other_lora = lora_of(model).model
    for path in both:
        for store in ("lora_A", "lora_B"):
            theirs, ours = (
                getattr(other_lora.get_submodule(path), store),
                getattr(plain.base_model.model.get_submodule(path), store),
            )
            ours["default"].weight.data.copy_(theirs["lora"].weight)
    plain.train(trains)
    bank = roadie.AdapterBank(plain, 4, dtype=torch.float64)
    for name, adapter in adapters.items():
        bank.admit(name, adapter)
    rows = ["other", None, "default", "default"]
    with bank.rows(rows):
        got = plain(x)
    wanted = [through_matrices(model, x[i : i + 1], road, "lora") for i, road in enumerate(rows)]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=ORDER_OF_SUMS)
    if trains:
        got.square().sum().backward()
        of_rows = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        with roadie.rows(model, rows):
            model.zero_grad()
            model(x).square().sum().backward()
        for path in both:
            wanted_grad = other_lora.get_submodule(path).lora_A["lora"].weight.grad
            torch.testing.assert_close(
                of_rows[f"base_model.model.{path}.lora_A.default.weight"], wanted_grad, rtol=0, atol=ORDER_OF_SUMS
            )
    with bank.rows([{"default": 0.5}] * 4):
        half = plain(x)
    with bank.rows([{"default": 1.0}] * 4):
        torch.testing.assert_close(plain(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)
    assert not torch.allclose(half, got)
    if not trains:
        with bank.rows(rows):
            routed = plain(x, adapter_names=["default", "default", "__base__", "__base__"])
        torch.testing.assert_close(routed[:2], got[:2], rtol=0, atol=ORDER_OF_SUMS)
        torch.testing.assert_close(
            routed[3:], through_matrices(model, x[3:], "default", None), rtol=0, atol=ORDER_OF_SUMS
        )
    bank.evict("default")
    with pytest.raises(RoutingError, match="default"), bank.rows(["default"] * 4):
        pass


def _layers(model: Any, name: str) -> dict[str, roadie.LayerParameters]:
    base = model.get_base_model()
    return {
        path: roadie.LayerParameters(
            road.road_theta[name].detach(), road.road_alpha[name].detach(), road.variant[name], road.group_size[name]
        )
        for path, road in ((path, base.get_submodule(path).road) for path in ("first", "second"))
    }


def _base_of(model: Any) -> nn.Module:
    return copy.deepcopy(model).unload()


def test_many_adapters_are_trained_at_once_on_a_lora_model() -> None:
    """The engine of `train_many` rotates the layers inside LoRA's: each row trains its own adapter, LoRA is frozen or not."""
    torch.manual_seed(0)
    plain = peft.get_peft_model(Two(), lora_config(target_modules=["first", "second"]))
    places = ["base_model.model.first.base_layer", "base_model.model.second.base_layer"]
    layers = [AdaptedLayer(path, 8, roadie.Variant.ROAD_2, (4,)) for path in places]
    bank = TrainableBank(torch.device("cpu"))
    bank.join({"a": layers, "b": layers})
    for stack in bank.families[0].stacks:
        stack.parameters.add_(0.3 * torch.randn(stack.parameters.shape, generator=torch.Generator().manual_seed(3)))
    x = inputs(4).float()
    rows = [0, 1, 1, -1]
    bank.make_tables()
    with bank.attached(plain, places), bank.routed(torch.tensor(rows)):
        got = plain(x)
    got.square().sum().backward()
    collect_gradients(bank)
    model = roadie.get_peft_model(Two(), road_config(target_modules=["first", "second"]))
    model.add_adapter("b", road_config(target_modules=["first", "second"]))
    roadie.add_lora(model, lora_config(target_modules=["first", "second"]))
    base = model.get_base_model()
    base.load_state_dict(plain.base_model.model.state_dict(), strict=False)
    for at, path in enumerate(("first", "second")):
        ours, theirs = base.get_submodule(path), plain.base_model.model.get_submodule(path)
        ours.get_base_layer().load_state_dict(theirs.get_base_layer().state_dict())
        for store in ("lora_A", "lora_B"):
            getattr(ours, store)["lora"].load_state_dict(getattr(theirs, store)["default"].state_dict())
        for number, name in enumerate(("default", "b")):
            theta, alpha = bank.families[0].stacks[0].parameters[at, :, number]
            ours.road.road_theta[name].data, ours.road.road_alpha[name].data = theta.clone(), alpha.clone()
            ours.road.road_theta[name].requires_grad_(True)
            ours.road.road_alpha[name].requires_grad_(True)
    with roadie.rows(model, ["default", "b", "b", None]):
        wanted = model(x)
    wanted.square().sum().backward()
    torch.testing.assert_close(got, wanted)
    for at, path in enumerate(("first", "second")):
        ours, theirs = base.get_submodule(path), plain.base_model.model.get_submodule(path)
        torch.testing.assert_close(theirs.lora_A["default"].weight.grad, ours.lora_A["lora"].weight.grad)
        for number, name in enumerate(("default", "b")):
            grads = bank.families[0].stacks[0].gradients[at, :, number]
            torch.testing.assert_close(grads[0], ours.road.road_theta[name].grad)
            torch.testing.assert_close(grads[1], ours.road.road_alpha[name].grad)


# Merging

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_is_unmerged_within_rounding(dtype: torch.dtype) -> None:
    model = two(dtype, lora_bias=True)
    layers = {path: model.get_base_model().get_submodule(path) for path in ("first", "second")}
    truths = {path: _truth(layer) for path, layer in layers.items()}
    before = {path: _stored(layer) for path, layer in layers.items()}
    model.merge_adapter(safe_merge=True)
    for path, layer in layers.items():
        base = layer.get_base_layer()
        for got, (truth, reach) in zip((base.weight, base.bias), truths[path], strict=True):
            # Two roundings to the dtype (after R, after B A), of which the first is of R W and the second of the sum; 7 for
            # the arithmetic of R, r + 2 for B A, in float32 or wider.
            bound = 2 * unit_roundoff(dtype) * reach + (7 + 4) * unit_roundoff(wide(dtype)) * reach
            assert got.dtype == dtype
            assert_within(got.detach(), truth, bound * ROOM + 2 * smallest_step(dtype), path)
    model.unmerge_adapter()
    for path, layer in layers.items():
        for got, wanted in zip(_stored(layer), before[path], strict=True):
            if dtype.itemsize == 2:
                assert_same_bits(got, wanted, path)
            else:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e4 * unit_roundoff(dtype))
        assert (layer.merged, layer.road.merged, layer.road.held_by) == (False, False, ())


def _truth(layer: LoraLinear) -> list[tuple[Tensor, Tensor]]:
    """The merged weight and bias in float64, and what they are sums of, in absolute values."""
    road: Any = layer.road
    base, theta, alpha = layer.get_base_layer(), road.road_theta["default"], road.road_alpha["default"]
    rotation = dense_rotation(theta.detach(), alpha.detach(), "road_2", road.group_size["default"])
    scale = layer.scaling["lora"]
    down, up = (store["lora"].weight.detach().double() for store in (layer.lora_A, layer.lora_B))
    extra = layer.lora_B["lora"].bias.detach().double() * scale
    weight, bias = base.weight.detach().double(), base.bias.detach().double()
    sizes = (rotation.abs() @ weight.abs() + scale * up.abs() @ down.abs(), rotation.abs() @ bias.abs() + extra.abs())
    return list(zip((rotation @ weight + scale * up @ down, rotation @ bias + extra), sizes, strict=True))


def _stored(layer: LoraLinear) -> list[Tensor]:
    base = layer.get_base_layer()
    return [base.weight.detach().clone(), base.bias.detach().clone()]


def test_merged_into_a_plain_model_it_computes_the_same() -> None:
    model, x = two(), inputs()
    wanted = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is Two
    assert {type(module) for module in merged.modules()} == {Two, nn.Linear}
    torch.testing.assert_close(merged(x), wanted, rtol=0, atol=ORDER_OF_SUMS)
    assert not any(name.startswith("_roadie") for name in merged.__dict__)


def test_merging_for_a_while_and_chosen_names() -> None:
    model, x = two(), inputs()
    for road, lora in (("default", "lora"), ("other", "fr")):
        model.merge_adapter([lora, road])
        with torch.no_grad():
            got = model(x)
        model.unmerge_adapter()
        torch.testing.assert_close(got, through_matrices(model, x, road, lora), rtol=0, atol=ORDER_OF_SUMS)


def test_the_wrong_order_is_refused_and_changes_nothing(portrait: Callable[[Any], Any]) -> None:
    model = two()
    before = portrait(model)
    for merge in (
        lora_of(model).merge_adapter,
        lambda: model.merge_adapter(["lora"]),
        model.get_base_model().first.merge,
    ):
        with pytest.raises(MergeError, match="not merged: the layer would give R"):
            merge()
        assert portrait(model) == before
    model.merge_adapter()
    before = portrait(model)
    road = model.base_model
    for change in (road.unmerge_adapter, lambda: road.merge_adapter(["other"]), lambda: road.set_adapter("other")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(MergeError, match="wanted LoRA unmerged first"):
                change()
        assert portrait(model) == before
    with pytest.raises(MergeError):
        roadie.add_lora(model, lora_config(target_modules=["first"]), "third")
    lora_of(model).unmerge_adapter()
    road.unmerge_adapter()


def test_the_wrong_order_is_seen_before_any_layer_is_touched(portrait: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = roadie.get_peft_model(Two(), road_config(target_modules=["second"]))
    roadie.add_lora(model, lora_config(target_modules=["first", "second"]))
    before = portrait(model)  # float32: adding and taking away B A would not give the bits back
    with pytest.raises(MergeError, match="not merged: the layer would give R"):
        lora_of(model).merge_adapter()
    assert portrait(model) == before


def test_unmerging_is_refused_whole_where_a_rotation_is_singular(portrait: Callable[[Any], Any]) -> None:
    model = two()
    model.get_base_model().second.road.road_alpha["default"].data[:2] = 0
    model.merge_adapter()
    before = portrait(model)
    with pytest.raises(MergeError, match="singular"):
        model.unmerge_adapter()
    assert portrait(model) == before


def test_a_broken_adapter_is_refused_before_anything_is_merged(portrait: Callable[[Any], Any]) -> None:
    model = two()
    model.get_base_model().second.lora_B["lora"].weight.data[0, 0] = torch.nan
    before = portrait(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="NaNs detected"):
            merge(safe_merge=True)
        assert portrait(model) == before


def test_setting_another_adapter_unmerges_first() -> None:
    model, x = two(), inputs()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(model(x), through_matrices(model, x, "other", "lora"), rtol=0, atol=ORDER_OF_SUMS)


def test_disabling_gives_the_base_model_also_where_both_are_merged() -> None:
    model, x = two(), inputs()
    wanted = through_matrices(model, x, None, None)
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(AssertionError):
        torch.testing.assert_close(model(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=ORDER_OF_SUMS)
    torch.testing.assert_close(model(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)


def test_lora_merged_where_road_had_nothing_to_do_keeps_road_out(portrait: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = roadie.get_peft_model(Two().double(), road_config(target_modules=["first"]))
    roadie.add_lora(model, lora_config(target_modules=["second"]))
    model.add_adapter("wider", road_config(target_modules=["first", "second"]))
    model.double().merge_adapter(["lora"])
    before = portrait(model)
    with pytest.raises(MergeError, match="wanted LoRA unmerged first"):
        model.get_base_model().second.road.set_adapter("wider")
    with pytest.raises(MergeError, match="wanted LoRA unmerged first"):
        model.get_base_model().second.road.merge(adapter_names=["wider"])
    with pytest.raises(RoutingError, match="unmerge_adapter"), roadie.rows(model, ["wider"]):
        pass
    assert portrait(model) == before


# Files


def test_saved_is_loaded(tmp_path: Path) -> None:
    model, ids = llama().eval(), tokens()
    base = _plain_llama()
    roadie.tuner.save_together(model, tmp_path / "both")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors")) == [
        "both/lora/adapter_model.safetensors",
        "both/road/adapter_model.safetensors",
    ]
    loaded = roadie.load_together(base, tmp_path / "both")
    assert isinstance(loaded, WithLora)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert_same_bits(loaded(ids).logits, model(ids).logits, "logits")
    trained = roadie.load_together(_plain_llama(), tmp_path / "both", is_trainable=True)
    wanted = {name for name, parameter in llama().named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in trained.named_parameters() if parameter.requires_grad} == wanted


def _plain_llama() -> Any:
    torch.manual_seed(0)
    return tiny_llama(initializer_range=0.2)


STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
ids = torch.tensor(json.load(sys.stdin))
for kind in ("road", "lora"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{folder}/{kind}").double().eval()
    torch.save((type(model.base_model).__module__, model(ids).logits), f"{folder}/{kind}.pt")
assert not any(name.startswith("roadie") for name in sys.modules)
"""


@pytest.mark.slow
def test_stock_peft_loads_each_alone(tmp_path: Path, base_folder: Path) -> None:
    torch.manual_seed(0)
    config = road_config(target_modules=TARGETS, group_size=8, task_type="CAUSAL_LM")
    model = roadie.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    roadie.add_lora(model, lora_config(target_modules=LORA_TARGETS)).eval()
    roadie.save_together(model, tmp_path)
    model.double()
    ids = tokens()
    command = [sys.executable, "-c", STOCK, str(base_folder), str(tmp_path)]
    subprocess.run(command, input=json.dumps(ids.tolist()), text=True, check=True, cwd=tmp_path)
    for kind, alone in (("road", without_lora), ("lora", without_road)):
        module, logits = torch.load(tmp_path / f"{kind}.pt")
        assert module == f"peft.tuners.{kind}.model"
        with torch.no_grad(), alone(model):
            wanted = model(ids).logits
        torch.testing.assert_close(logits, wanted, rtol=0, atol=ORDER_OF_SUMS)  # stock PEFT rotates in another order
        with torch.no_grad():
            assert (model(ids).logits - wanted).abs().max() > 0.1


def test_saving_as_peft_does_writes_every_adapter_where_it_is_found_again(tmp_path: Path) -> None:
    model, ids = llama().eval(), tokens()
    model.add_adapter("fr", lora_config(target_modules=LORA_TARGETS))
    model.save_pretrained(tmp_path)
    alone = roadie.PeftModel.from_pretrained(_plain_llama(), tmp_path).eval()
    with torch.no_grad(), without_lora(model):
        assert_same_bits(alone(ids).logits, model(ids).logits, "RoAd alone")
    other = roadie.add_lora(alone, tmp_path / "lora")
    other.load_adapter(tmp_path / "fr", "fr")
    for name in ("lora", "fr"):
        model.set_adapter(name)
        other.set_adapter(name)
        with torch.no_grad():
            assert_same_bits(other(ids).logits, model(ids).logits, name)


def test_road_saved_from_such_a_model_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = road_config(target_modules=TARGETS, group_size=8, task_type="CAUSAL_LM")
    model = roadie.get_peft_model(_plain_llama(), config)
    model.save_pretrained(tmp_path / "before")
    roadie.add_lora(model, lora_config(target_modules=LORA_TARGETS))
    roadie.save_together(model, tmp_path / "both")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "both" / "road" / name).read_bytes()


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    roadie.save_together(model, tmp_path / "both")
    with pytest.raises(CheckpointError, match="overwrite"):
        roadie.save_together(model, tmp_path / "both")
    before = {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*.*")) if p.is_file()}
    from roadie.tuner.with_lora import lora_files

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lora_files, "write", full)
        for folder in ("both", "new"):
            with pytest.raises(OSError, match="No space"):
                roadie.save_together(model, tmp_path / folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["both"]
    assert {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*.*")) if p.is_file()} == before
    roadie.save_together(model, tmp_path / "both", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["both"]


def _lose_lora(folder: Path) -> None:
    (folder / "lora" / "adapter_config.json").unlink()


def _lose_road(folder: Path) -> None:
    (folder / "road" / "adapter_model.safetensors").unlink()


def _cut(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _nan(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file)


def _one_less(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(iter(tensors))]
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [_lose_lora, _lose_road, _cut, _nan, _one_less])
def test_what_cannot_be_loaded_whole_leaves_the_model_alone(
    damage: Callable[[Path], None], tmp_path: Path, portrait: Callable[[Any], Any]
) -> None:
    roadie.save_together(llama(), tmp_path / "both")
    damage(tmp_path / "both")
    base = _plain_llama()
    before = portrait(base)
    with pytest.raises(CheckpointError):
        roadie.load_together(base, tmp_path / "both")
    after = portrait(base)
    assert {key: after[key] for key in ("types", "bits", "attributes")} == {
        key: before[key] for key in ("types", "bits", "attributes")
    }


def test_a_further_adapter_that_cannot_be_loaded_is_nowhere_and_its_name_is_free(
    tmp_path: Path, portrait: Callable[[Any], Any]
) -> None:
    model = llama()
    roadie.save_together(model, tmp_path / "both")
    _nan(tmp_path / "both")
    before, names = portrait(model), set(lora_of(model).peft_config)
    with pytest.raises(CheckpointError, match="finite"):
        roadie.add_lora(model, tmp_path / "both" / "lora", "further")
    assert portrait(model) == before
    assert set(lora_of(model).peft_config) == names
    roadie.add_lora(model, lora_config(target_modules=["q_proj"]), "further")


# Adding, refusing, copying


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["second"]}, "RoadConfig"),
    ({"target_modules": ["nowhere"]}, "nowhere"),
    ({"target_modules": ["table"]}, "Embedding"),
]


class WithTable(Two):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)


@pytest.mark.parametrize(("settings", "what"), REFUSED)
@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_not_plain_lora_is_refused_and_changes_nothing(
    settings: dict[str, Any], what: str, earlier: bool, portrait: Callable[[Any], Any]
) -> None:
    model = roadie.get_peft_model(WithTable(), road_config(target_modules=["first"]))
    if earlier:
        roadie.add_lora(model, lora_config(target_modules=["first"]), "earlier")
    before, kind = portrait(model), type(model)
    with pytest.raises((ConfigError, UnsupportedLayer, ValueError), match=what):
        roadie.add_lora(model, lora_config(**{"target_modules": ["first"], **settings}))
    assert portrait(model) == before
    assert type(model) is kind
    if earlier:
        assert set(lora_of(model).peft_config) == {"earlier"}
        assert all(set(layer.r) == {"earlier"} for layer in lora_of(model).layers())


def test_names_are_shared_by_both_kinds() -> None:
    model = two()
    for name in ("default", "lora"):
        with pytest.raises(ConfigError, match="no adapter has"):
            roadie.add_lora(model, lora_config(target_modules=["first"]), name)
    with pytest.raises(ConfigError, match="get_peft_model"):
        roadie.add_lora(Two(), lora_config(target_modules=["first"]))
    lora_first = peft.get_peft_model(Two(), lora_config(target_modules=["first"]))
    with pytest.raises(ConfigError, match="RoAd over LoRA"):
        roadie.add_lora(lora_first, lora_config(target_modules=["first"]))


def test_deleting_and_adding_again() -> None:
    model, x = two(), inputs()
    model.delete_adapter("lora")
    model.set_adapter("fr")
    torch.testing.assert_close(model(x), through_matrices(model, x, "default", "fr"), rtol=0, atol=ORDER_OF_SUMS)
    model.set_adapter("other")
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), through_matrices(model, x, "other", "fr"), rtol=0, atol=ORDER_OF_SUMS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    model, x = two(), inputs()
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x))
    twin.set_adapter("fr")
    with roadie.lora_rows(twin, [None] * 4):
        torch.testing.assert_close(model(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)
    twin.merge_adapter()
    torch.testing.assert_close(twin(x), through_matrices(model, x, "default", "fr"), rtol=0, atol=ORDER_OF_SUMS)
    torch.testing.assert_close(model(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = roadie.get_peft_model(Two(), road_config(target_modules=["first"])).eval()
    roadie.add_lora(model, lora_config(target_modules=["first"], lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
    x = inputs().float()
    assert torch.equal(model(x), model(x))
    model.train()
    with roadie.lora_rows(model, ["lora"] * 4):
        assert not torch.equal(model(x), model(x))


def test_blends_of_road_stand_beside_lora() -> None:
    model, x = two(), inputs()
    model.eval()
    with roadie.rows(model, [{"other": 0.5}] * 4), torch.no_grad():
        half = model(x)
    model.add_weighted_adapter(["other"], [0.5], "halved")
    model.set_adapter("halved")
    torch.testing.assert_close(half, model(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), through_matrices(model, x, "halved", "lora"), rtol=0, atol=ORDER_OF_SUMS)


# Other kinds of layers, and modules that are trained whole


def test_lora_switched_off_alone_switches_nothing_else() -> None:
    model, x = two(), inputs()
    lora_of(model).disable_adapter_layers()
    torch.testing.assert_close(model(x), through_matrices(model, x, "default", None), rtol=0, atol=ORDER_OF_SUMS)
    lora_of(model).enable_adapter_layers()
    torch.testing.assert_close(model(x), through_matrices(model, x, "default", "lora"), rtol=0, atol=ORDER_OF_SUMS)


class Classifier(Two):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(super().forward(x))


def test_a_classifier_that_road_trains_whole_stays_road_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Classifier()
    plain = copy.deepcopy(base)
    model = roadie.get_peft_model(base, road_config(target_modules=["first"], modules_to_save=["classifier"]))
    roadie.add_lora(model, lora_config(target_modules=["first"]))
    model.set_adapter("lora")
    x = inputs().float()
    model(x).sum().backward()
    head: Any = base.classifier
    assert head.modules_to_save["default"].weight.grad is not None
    head.modules_to_save["default"].weight.data.add_(1)
    roadie.save_together(model, tmp_path / "both")
    loaded = roadie.load_together(plain, tmp_path / "both")
    assert_same_bits(loaded(x), model(x), "loaded")
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


class Convolution(nn.Module):
    """transformers' Conv1D, whose weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_conv1d_keeps_its_weight_transposed() -> None:
    torch.manual_seed(0)
    model = roadie.get_peft_model(Convolution().double(), road_config(target_modules=["first"]))
    roadie.add_lora(model, lora_config(target_modules=["first"])).double()
    x, layer = inputs(), model.get_base_model().first
    with torch.no_grad():
        wanted = (
            layer.road(x) + layer.scaling["lora"] * x @ layer.lora_A["lora"].weight.T @ layer.lora_B["lora"].weight.T
        )
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=ORDER_OF_SUMS)
        merged = model.merge_and_unload()
        assert merged.first.weight.shape == (6, 8)
        torch.testing.assert_close(merged(x), wanted, rtol=0, atol=ORDER_OF_SUMS)


def test_quantised_layers_take_lora_but_no_merge(base_folder: Path, portrait: Callable[[Any], Any]) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=settings)
    torch.manual_seed(0)
    model = roadie.get_peft_model(base, road_config(target_modules=TARGETS, group_size=8))
    ids = tokens()
    with torch.no_grad():
        rotated = model(ids).logits
        roadie.add_lora(model, lora_config(target_modules=LORA_TARGETS))
        assert (model(ids).logits - rotated).abs().max() > 0.1
        with without_lora(model):
            assert_same_bits(model(ids).logits, rotated, "LoRA switched off")
        with roadie.lora_rows(model, ["lora", None, "lora"]):
            mixed = model(ids).logits
        torch.testing.assert_close(mixed[1], rotated[1])
        torch.testing.assert_close(mixed[::2], model(ids).logits[::2])
    with pytest.raises(MergeError, match="quantised"):
        model.merge_adapter()
    assert not any(layer.road.merged for layer in lora_of(model).layers() if layer.road is not None)
