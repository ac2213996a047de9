"""docs/scale.md is what its formulas and the records say, and the formulas are true of real models and adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch
from benchmarks import scale
from transformers import LlamaConfig, LlamaForCausalLM

from roadie import RoadConfig
from roadie.engine import TrainingEngine, TrainingRow
from roadie.rotation import from_parameters

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = scale.Shape("tiny", hidden=64, intermediate=192, layers=2, key_value=32, vocabulary=100, tied=True)
SHAPES = (scale.MEASURED, scale.SHAPES[1], TINY)


def llama(shape: scale.Shape) -> LlamaForCausalLM:
    """A model of that shape without memory."""
    heads = shape.hidden // 32
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    sizes |= {"num_hidden_layers": shape.layers, "num_attention_heads": heads, "tie_word_embeddings": shape.tied}
    config = LlamaConfig(**sizes, num_key_value_heads=shape.key_value // 32, vocab_size=shape.vocabulary)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_the_document_is_what_the_formulas_and_records_say() -> None:
    assert scale.DOCUMENT.read_text(encoding="utf-8") == scale.text_of(scale.measured(scale.RESULTS))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_have_the_parameters_of_a_model(shape: scale.Shape) -> None:
    model = llama(shape)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert shape.parameters == matrices
    embeddings = model.get_input_embeddings().weight.numel()
    assert shape.read_a_step == matrices - (0 if shape.tied else embeddings)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_files_have_the_bytes_of_an_adapter(variant: str) -> None:
    model = peft.get_peft_model(llama(TINY), RoadConfig(variant=variant, group_size=32, target_modules=LINEAR))
    assert scale.file_bytes(TINY, variant, "float32") == 4 * trained(model)
    assert scale.file_bytes(TINY, variant, "bfloat16") == 2 * trained(model)
    assert scale.training_bytes(TINY, variant) == 16 * trained(model)


def test_tables_have_the_bytes_of_rotations() -> None:
    whole = 0
    for _, outputs in TINY.linear * TINY.layers:
        rotation = from_parameters(torch.zeros(outputs // 2), torch.ones(outputs // 2), "road_1", 2)
        whole += rotation.direct.nbytes + rotation.cross.nbytes
    assert scale.table_bytes(TINY, "float32") == whole


@pytest.mark.parametrize("rank", [1, 8])
def test_lora_has_the_bytes_of_an_adapter(rank: int) -> None:
    model = peft.get_peft_model(llama(TINY), peft.LoraConfig(r=rank, target_modules=LINEAR))
    assert scale.lora_bytes(TINY, rank, "float32") == 4 * trained(model)


def test_a_cache_is_keys_and_values_of_every_layer() -> None:
    assert scale.key_value_bytes(TINY, tokens=3) == 3 * 2 * 2 * 32 * 2


def test_slots_fill_what_is_left() -> None:
    weights, cached = 2 * TINY.parameters, scale.key_value_bytes(TINY, 10)
    memory = (weights + cached + 5 * 1000) / 0.9
    assert scale.slots_that_fit(TINY, memory + 1, 1000, 10) == 5
    assert scale.slots_that_fit(TINY, memory - 2, 1000, 10) == 4
    assert scale.slots_that_fit(TINY, 1.0, 1000, 10) == 0


def engine_of(shape: scale.Shape, dtype: torch.dtype, variant: str) -> TrainingEngine:
    """A tenant of a model of that shape, with weights, heads of 32."""
    model = llama(shape).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    for _, inverse in model.named_buffers():
        inverse.fill_(0.1)
    engine = TrainingEngine(model.to(dtype))
    engine.create("a", RoadConfig(task_type="CAUSAL_LM", variant=variant, group_size=32, target_modules=LINEAR))
    engine.run()
    return engine


def kept_bytes(shape: scale.Shape, tokens: int, dtype: torch.dtype, variant: str) -> int:
    """What autograd keeps of a forward and backward of the engine, each storage once."""
    engine, kept = engine_of(shape, dtype, variant), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[torch._C._data_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    row = TrainingRow(torch.arange(tokens) % shape.vocabulary, torch.zeros(tokens, dtype=torch.int64))
    engine.forward_backward("a", [row], "cross_entropy")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.run()
    return sum(kept.values())


@pytest.mark.parametrize(("dtype", "variant"), [("bfloat16", "road_1"), ("float32", "road_1"), ("bfloat16", "road_2")])
def test_a_pass_keeps_the_activations_of_its_tokens(dtype: str, variant: str) -> None:
    """Of a block and a token, beside the norms' scales and the attention's logarithms of sums: a float32 each."""
    two, one = (dataclasses.replace(TINY, layers=layers) for layers in (2, 1))
    long, short = (
        kept_bytes(two, tokens, getattr(torch, dtype), variant)
        - kept_bytes(one, tokens, getattr(torch, dtype), variant)
        for tokens in (128, 64)
    )
    numbers = 2 + TINY.hidden // 32
    assert long - short == scale.activation_bytes(one, 64, variant, dtype) + 64 * 4 * numbers


@pytest.mark.parametrize("variant", ["road_1", "road_2"])
def test_a_tenant_has_the_bytes_of_its_stacks_and_tables(variant: str) -> None:
    engine = engine_of(TINY, torch.float32, variant)
    stacks = [stack for family in engine.bank.families for stack in family.stacks]
    assert scale.training_bytes(TINY, variant) == sum(
        tensor.nbytes for stack in stacks for tensor in (*stack.tensors.values(), stack.gradients)
    )


def test_tenants_fill_what_is_left() -> None:
    taken = 2 * TINY.parameters + 600
    assert scale.tenants_that_fit(TINY, (taken + 5 * 1000 + 1) / 0.9, 1000, 600) == 5
    assert scale.tenants_that_fit(TINY, (taken + 5 * 1000 - 1) / 0.9, 1000, 600) == 4
    assert scale.tenants_that_fit(TINY, 1.0, 1000, 600) == 0


def test_a_pass_has_a_tenant_a_row() -> None:
    tables = 2 * 8 * TINY.outputs  # direct, cross, and the gradients of both
    assert scale.pass_bytes(TINY, 512, "road_1") == scale.activation_bytes(TINY, 512, "road_1") + 2 * tables


def test_traffic_grows_with_the_adapters_of_a_step_alone() -> None:
    one = scale.added_traffic(TINY, 1, 1000, 100, rows=8)
    assert scale.added_traffic(TINY, 8, 1000, 100, rows=8) == pytest.approx(8 * one)
    wider = dataclasses.replace(TINY, vocabulary=200)
    assert scale.added_traffic(wider, 1, 1000, 100, rows=8) < one
