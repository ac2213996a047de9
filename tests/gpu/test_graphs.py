"""CUDA graphs over static slots, and compiled models that replay them; the same on a CPU is tests/bank/test_static.py."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import roadie
from roadie.bank import AdapterBank
from roadie.testing import random_adapter, randomise, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ["a", "b", "c"]
BATCHES = [["a", "b", "__base__", "c"], ["c", "c", "a", "b"], ["__base__", "b", "b", "a"]]


def _host(kind: str) -> tuple[Any, AdapterBank | None]:
    model = tiny_llama().eval().cuda()
    if kind == "bank":
        bank = AdapterBank(model, slots=4)
        for seed, name in enumerate(NAMES):
            bank.admit(name, random_adapter(model, seed=seed, group_size=4))
        return model, bank
    config = roadie.RoadConfig(target_modules="all-linear", group_size=4)
    adapted = roadie.get_peft_model(model, config, adapter_name="a")
    for name in NAMES[1:]:
        adapted.add_adapter(name, config)
    return randomise(adapted, seed=1).requires_grad_(False), None


def _slots(bank: AdapterBank | None, names: list[str]) -> Tensor:
    if bank is not None:
        return bank.slots(names)
    return torch.tensor([-1 if name == "__base__" else NAMES.index(name) for name in names])


@pytest.mark.parametrize("kind", ["bank", "peft"])
@torch.no_grad()
def test_replays_rotate_by_what_the_slots_hold(kind: str) -> None:
    model, bank = _host(kind)
    ids = torch.arange(12, device="cuda").view(4, 3)
    embedded = model.get_input_embeddings()(ids)
    held = [_slots(bank, names) for names in BATCHES]

    def call() -> Tensor:
        return model(inputs_embeds=embedded, use_cache=False).logits

    wanted = []
    for names in BATCHES:
        with roadie.rows(model, names):
            wanted.append(call())
    static, graph = held[0].cuda(), torch.cuda.CUDAGraph()
    with roadie.rows(model, static, static=True):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = call()
    gc.collect()
    torch.cuda.empty_cache()
    for slots, expected in zip(held * 2, wanted * 2, strict=True):
        static.copy_(slots)
        graph.replay()
        torch.testing.assert_close(result, expected)


@torch.no_grad()
def test_a_compiled_model_with_mixed_rows_replays_graphs() -> None:
    model, _ = _host("peft")
    ids = torch.arange(12, device="cuda").view(4, 3)
    wanted = []
    for names in BATCHES:
        with roadie.rows(model, names):
            wanted.append(model(input_ids=ids, use_cache=False).logits)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):
        for names, expected in zip(BATCHES, wanted, strict=True):
            with roadie.rows(compiled, names):
                torch.compiler.cudagraph_mark_step_begin()
                torch.testing.assert_close(
                    compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4
                )
