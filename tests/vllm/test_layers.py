"""vLLM's layers, without an engine: how rotations are divided over ranks and joined over parts, and what a compiler sees."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from roadie.errors import AdapterError, ConfigError
from roadie.kernels import rotate as rotate_slots
from roadie.rotation import Rotation, rotate
from roadie.vllm import layers
from roadie.vllm.layers import RotatedColumn, RotatedMergedColumn, RotatedMergedQKV, RotatedQKV, RotatedRow, slot_table
from roadie.vllm.settings import Settings

HEAD = 16


def a_rotation(width: int, group_size: int, seed: int = 0) -> Rotation:
    direct, cross = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    return Rotation(direct, cross, group_size)


def qkv(kind: type, rank: int, num_ranks: int, *, heads: int = 8, kv_heads: int = 2) -> Any:
    """vLLM's layer of 8 query heads and 2 key heads as rank `rank` sees it; only what dividing needs."""
    layer = object.__new__(kind)
    local = max(1, kv_heads // num_ranks)
    base = SimpleNamespace(
        total_num_heads=heads,
        num_heads=heads // num_ranks,
        total_num_kv_heads=kv_heads,
        num_kv_heads=local,
        num_kv_head_replicas=max(1, num_ranks // kv_heads),
        head_size=HEAD,
        skip_bias_add=False,
        bias=None,
    )
    q, kv = base.num_heads * HEAD, local * HEAD
    values = {
        "base_layer": base,
        "tp_size": num_ranks,
        "tp_rank": rank,
        "output_size": q + 2 * kv,
        "output_slices": (q, kv, kv),
        "output_ids": (rank, *[rank // base.num_kv_head_replicas] * 2),
        "n_slices": 3 if kind is RotatedMergedQKV else 1,
        "q_proj_shard_size": q,
        "kv_proj_shard_size": kv,
        "q_proj_total_size": heads * HEAD,
        "kv_proj_total_size": kv_heads * HEAD,
        "slot_tables": (slot_table(1, q + 2 * kv, torch.device("cpu")),),
    }
    torch.nn.Module.__init__(layer)
    for name, value in values.items():
        object.__setattr__(layer, name, value)
    return layer


def of_rank(x: torch.Tensor, rank: int, num_ranks: int, kv_heads: int = 2) -> torch.Tensor:
    """What of the whole layer's outputs is on a rank: its query heads, and the key heads that these need."""
    q, k, v = x.split([8 * HEAD, kv_heads * HEAD, kv_heads * HEAD], -1)
    kv_rank, kv_ranks = rank // max(1, num_ranks // kv_heads), min(num_ranks, kv_heads)
    return torch.cat((q.chunk(num_ranks, -1)[rank], k.chunk(kv_ranks, -1)[kv_rank], v.chunk(kv_ranks, -1)[kv_rank]), -1)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [RotatedMergedQKV, RotatedQKV])
def test_rotating_on_each_rank_is_rotating_the_whole(kind: type, num_ranks: int) -> None:
    """Also where key heads are on several ranks; the parts are three layers of the model, or one."""
    x = torch.randn(5, 12 * HEAD, generator=torch.Generator().manual_seed(9))
    whole = [a_rotation(12 * HEAD, HEAD), a_rotation(12 * HEAD, 4, seed=1)]
    parts = [[part[i] for part in map(split, whole)] for i in range(3)]
    for rank in range(num_ranks):
        (local,) = qkv(kind, rank, num_ranks).placed(parts if kind is RotatedMergedQKV else [whole])
        here = of_rank(x, rank, num_ranks)
        assert [rotation.group_size for rotation in local] == [HEAD, 4]
        assert torch.equal(in_a_row(here, local), of_rank(in_a_row(x, whole), rank, num_ranks))


def split(whole: Rotation) -> list[Rotation]:
    """q, k and v."""
    widths = (8 * HEAD, 2 * HEAD, 2 * HEAD)
    halves = zip(whole.direct.split(widths), whole.cross.split(widths), strict=True)
    return [Rotation(direct, cross, whole.group_size) for direct, cross in halves]


def in_a_row(x: torch.Tensor, rotations: Sequence[Rotation]) -> torch.Tensor:
    for rotation in rotations:
        x = rotate(x, rotation)
    return x


def test_parts_that_are_not_adapted_are_left_alone() -> None:
    x = torch.randn(5, 12 * HEAD, generator=torch.Generator().manual_seed(9))
    (placed,) = qkv(RotatedMergedQKV, 0, 1).placed([(), [a_rotation(2 * HEAD, HEAD)], ()])
    z = in_a_row(x, placed)
    assert torch.equal(z[:, : 8 * HEAD], x[:, : 8 * HEAD])
    assert torch.equal(z[:, 10 * HEAD :], x[:, 10 * HEAD :])
    assert torch.equal(z[:, 8 * HEAD : 10 * HEAD], rotate(x[:, 8 * HEAD : 10 * HEAD], a_rotation(2 * HEAD, HEAD)))
    assert not any(qkv(RotatedMergedQKV, 0, 1).placed([(), (), ()]))


def test_a_part_with_fewer_rotations_in_a_row_has_the_identity_in_the_last_ones() -> None:
    x = torch.randn(5, 12 * HEAD, generator=torch.Generator().manual_seed(9))
    q, v = [a_rotation(8 * HEAD, 4)], [a_rotation(2 * HEAD, 4, seed=1), a_rotation(2 * HEAD, HEAD, seed=2)]
    (placed,) = qkv(RotatedMergedQKV, 0, 1).placed([q, (), v])
    expected = [in_a_row(part, each) for part, each in zip(x.split((128, 32, 32), -1), (q, (), v), strict=True)]
    assert torch.equal(in_a_row(x, placed), torch.cat(expected, -1))


def test_more_rotations_than_there_is_room_for_are_refused_with_what_to_do() -> None:
    layer = with_tables(merged(8, 8), 16)
    two = [a_rotation(8, 4), a_rotation(8, 2)]
    assert [len(each) for each in layer.placed([two, ()])] == [2]  # an eager engine makes room
    assert [len(each) for each in layer.placed_inputs([[a_rotation(24, 4)], ()])] == [1, 0]
    object.__setattr__(layer, "settings", Settings().settled())
    with pytest.raises(ConfigError, match=r"got 2 rotations of a layer's output .*room for 1.*\{\"stages\": 2\}"):
        layer.placed([two, ()])
    with pytest.raises(ConfigError, match=r"got 1 rotations of a layer's input .*room for 0.*\{\"input_stages\": 1\}"):
        layer.placed_inputs([[a_rotation(24, 4)], ()])
    assert Settings(stages=3, input_stages=2).settled() == Settings(stages=3, input_stages=2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_has_some_of_the_inputs_rotates_these(num_ranks: int) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(9))
    whole, here = [a_rotation(32, 8), a_rotation(32, 16, seed=1)], []
    for rank in range(num_ranks):
        (local,) = row(rank, num_ranks).placed_inputs([whole])
        here.append(in_a_row(x.chunk(num_ranks, -1)[rank], local))
    assert torch.equal(torch.cat(here, -1), in_a_row(x, whole))
    if num_ranks > 1:
        with pytest.raises(ConfigError, match="got group_size=32 for a layer with 16 inputs on each of 2 ranks"):
            row(0, num_ranks).placed_inputs([[a_rotation(32, 32)]])


def row(rank: int, num_ranks: int) -> Any:
    """vLLM's layer of 32 inputs, some of them on each rank, and 8 outputs."""
    layer = object.__new__(RotatedRow)
    torch.nn.Module.__init__(layer)
    values = {"base_layer": SimpleNamespace(input_size=32), "tp_size": num_ranks, "tp_rank": rank, "output_size": 8}
    for name, value in {**values, "input_size": 32 // num_ranks}.items():
        object.__setattr__(layer, name, value)
    return layer


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_groups_that_ranks_would_tear_apart_are_refused(num_ranks: int) -> None:
    """Over 2 ranks k has 16 outputs on each; over 4 too, each of them twice."""
    layer = qkv(RotatedMergedQKV, 0, num_ranks)
    with pytest.raises(
        ConfigError, match=f"got group_size=32 for a layer with 16 outputs on each of {num_ranks} ranks"
    ):
        layer.placed([(), [a_rotation(2 * HEAD, 2 * HEAD)], ()])


def merged(*widths: int) -> Any:
    layer = object.__new__(RotatedMergedColumn)
    torch.nn.Module.__init__(layer)
    base = SimpleNamespace(skip_bias_add=False, bias=None, input_size=24)
    values = {"base_layer": base, "tp_size": 1, "output_sizes": widths}
    for name, value in {**values, "output_slices": widths}.items():
        object.__setattr__(layer, name, value)
    return layer


def with_tables(layer: Any, *widths: int) -> Any:
    object.__setattr__(layer, "table_widths", widths)
    object.__setattr__(layer, "slot_tables", tuple(slot_table(2, width, torch.device("cpu")) for width in widths))
    return layer


def test_parts_of_several_sizes_are_refused_in_one_table_and_taken_in_one_each() -> None:
    parts = [a_rotation(8, 4), a_rotation(8, 2)]
    with pytest.raises(
        ConfigError, match=r"got group sizes \[2, 4\] in the parts of one layer.*\"packing\": \"parts\""
    ):
        with_tables(merged(8, 8), 16).placed([[part] for part in parts])
    placed = with_tables(merged(8, 8), 8, 8).placed([[part] for part in parts])
    for (got,), part in zip(placed, parts, strict=True):
        assert torch.equal(got.direct, part.direct)
        assert got.group_size == part.group_size


def test_a_part_that_starts_within_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="got group_size=4 for a part that starts at output 6"):
        with_tables(merged(6, 8), 14).placed([(), [a_rotation(8, 4)]])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="got 16 outputs; the model has 8"):
        with_tables(merged(8, 8), 16).placed([(), [a_rotation(16, 4)]])
    with pytest.raises(AdapterError, match="got 16 inputs; the model has 24"):
        with_tables(merged(8, 8), 16).placed_inputs([(), [a_rotation(16, 4)]])
    with pytest.raises(AdapterError, match="a layer of 2 parts where vLLM names 1"):
        with_tables(merged(8, 8), 16).placed([[a_rotation(8, 4)]])


def test_a_layer_whose_bias_comes_later_is_refused() -> None:
    layer = with_tables(merged(8, 8), 16)
    object.__setattr__(layer, "base_layer", SimpleNamespace(skip_bias_add=True, bias=torch.zeros(16)))
    with pytest.raises(ConfigError, match="whose bias vLLM adds later"):
        layer.placed([[a_rotation(8, 4)], ()])


class Wrapper(torch.nn.Module):
    """A layer of ours as vLLM runs it: the base layer's output, and the tokens' slots in a buffer that is longer."""

    def __init__(self, kind: type, widths: tuple[int, ...], num_slots: int) -> None:
        super().__init__()
        self.layer = object.__new__(kind)
        torch.nn.Module.__init__(self.layer)
        self.layer.base_layer = torch.nn.Identity()
        self.layer.table_widths = widths
        self.layer.slot_tables = tuple(slot_table(num_slots, width, torch.device("cpu")) for width in widths)
        self.layer.punica_wrapper = SimpleNamespace(_token_lora_indices=torch.full((64,), -1))

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return self.layer._apply_lora_to_output(output, output * 1.0)


@pytest.mark.parametrize("widths", [(64,), (32, 16, 16)])
@pytest.mark.parametrize("shape", [(7,), (1, 7)])
def test_each_token_is_rotated_by_its_slot_compiled_or_not(widths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    model = Wrapper(RotatedRow if len(widths) == 1 else RotatedColumn, widths, 4)
    rotations = {slot: [a_rotation(width, 8 >> slot, slot) for width in widths] for slot in (0, 2)}
    for slot, each in rotations.items():
        model.layer.set_lora(slot, (), tuple([rotation] for rotation in each))
    slots = [0, -1, 2, 2, 0, 1, 3]
    model.layer.punica_wrapper._token_lora_indices[:7] = torch.tensor(slots)
    y = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
    expected = y.clone().view(7, 64)
    for token, slot in enumerate(slots):
        if slot in rotations:
            parts = expected[token].split(widths)
            expected[token] = torch.cat([rotate(p, r) for p, r in zip(parts, rotations[slot], strict=True)])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(model(y), expected.view(y.shape))
        assert torch.equal(compiled(y), expected.view(y.shape))
        model.layer.reset_lora(2)  # in place: what was compiled sees it
        expected[2], expected[3] = y.view(7, 64)[2], y.view(7, 64)[3]
        assert torch.equal(compiled(y), expected.view(y.shape))
        assert torch.equal(compiled(y.view(7, 64)[:5]), expected[:5])


class Whole(torch.nn.Module):
    """A layer of ours with its base layer, of 8 inputs and as many outputs as `widths` say."""

    def __init__(self, kind: type, widths: tuple[int, ...], settings: Settings) -> None:
        super().__init__()
        weight = torch.randint(-3, 4, (sum(widths), 8), generator=torch.Generator().manual_seed(5)).float()
        base = torch.nn.Linear(8, sum(widths), bias=False)
        base.weight.data = weight
        base.input_size = 8
        base.quant_method = SimpleNamespace(apply=lambda base, x, bias: base(x))
        self.layer = object.__new__(kind)
        torch.nn.Module.__init__(self.layer)
        values = {
            "base_layer": base,
            "output_slices": widths,
            "output_size": sum(widths),
            "input_size": 8,
            "tp_size": 1,
        }
        for name, value in {**values, "device": torch.device("cpu"), "_enable_aux_cuda_stream": False}.items():
            setattr(self.layer, name, value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "making", settings)
            self.layer.create_lora_weights(4, None)
        self.layer.punica_wrapper = SimpleNamespace(_token_lora_indices=torch.full((64,), -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.apply(x)


def a_plain_rotation(width: int, group_size: int, seed: int) -> Rotation:
    """Of numbers whose products and sums float32 holds exactly, so that the order of sums does not matter."""
    direct, cross = torch.randint(-2, 3, (2, width), generator=torch.Generator().manual_seed(seed)).float()
    return Rotation(direct, cross, group_size)


@pytest.mark.parametrize("widths", [(16,), (8, 4, 4)])
@pytest.mark.parametrize("shape", [(5,), (1, 5)])
@pytest.mark.parametrize("settings", [Settings(), Settings(stages=2, input_stages=2), Settings(None, None, "parts")])
def test_each_part_has_the_input_of_its_own_rotations(
    widths: tuple[int, ...], shape: tuple[int, ...], settings: Settings
) -> None:
    """z = R_out (W (R_in x)) part by part and token by token, compiled or not, whenever tables are made."""
    model = Whole(RotatedRow if len(widths) == 1 else RotatedMergedColumn, widths, settings)
    chains = {
        slot: [
            [[a_plain_rotation(width, size, 9 * i + size + slot) for size in sizes] for i, width in enumerate(of)]
            for of, sizes in (([8] * len(widths), (2, 8)[: slot + 1]), (widths, (4, 2)[: slot + 1]))
        ]
        for slot in (0, 1)
    }
    for slot, (inputs, outputs) in chains.items():
        joined = layers._joined(outputs, widths) if len(model.layer.slot_tables) == 1 else None
        model.layer.set_lora(slot, tuple(inputs), tuple(outputs) if joined is None else (joined,))
    slots = [0, -1, 1, 2, 1]
    model.layer.punica_wrapper._token_lora_indices[:5] = torch.tensor(slots)
    x = torch.randint(-3, 4, (*shape, 8), generator=torch.Generator().manual_seed(1)).float()
    expected = []
    for token, slot in zip(x.view(5, 8), slots, strict=True):
        inputs, outputs = chains.get(slot, [[[]] * len(widths)] * 2)
        weights = model.layer.base_layer.weight.split(widths)
        parts = zip(weights, inputs, outputs, strict=True)
        expected.append(torch.cat([in_a_row(w @ in_a_row(token, before), after) for w, before, after in parts]))
    whole = torch.stack(expected).view(*shape, sum(widths))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(model(x), whole)
        assert torch.equal(compiled(x), whole)
        model.layer.reset_lora(0)  # in place: what was compiled sees it
        assert torch.equal(compiled(x).view(5, -1)[0], model.layer.base_layer.weight @ x.view(5, 8)[0])


@pytest.mark.parametrize("stages", [1, 3])
def test_the_memory_of_a_table_never_moves(stages: int) -> None:
    table = slot_table(3, 8, torch.device("cpu"), stages)

    def addresses() -> list[int]:
        assert len(table.current) == stages
        return [t.data_ptr() for each in table.current for t in (each.direct, each.cross, each.sizes) if t is not None]

    before = addresses()
    assert len(before) == 3 * stages
    table.write([0], [a_rotation(8, 2)] * stages)
    table.clear([0])
    table.write([1], [a_rotation(8, 4)])
    table.clear([1])
    table.write([2], [a_rotation(8, 2)])
    assert before == addresses()
    y = torch.randn(3, 8)
    assert torch.equal(rotate_slots(y.clone(), table.current, torch.tensor([1, 0, -1])), y)


def test_every_kind_of_layer_is_one_of_vllms_with_our_methods() -> None:
    assert len(layers.ROTATED_LAYERS) == 6
    for kind in layers.ROTATED_LAYERS:
        first, second = kind.__bases__
        assert first is layers.RotatedLayer
        assert second.__name__ == second.__qualname__
        assert second.__module__.startswith("vllm.lora.layers")
        for name in ("create_lora_weights", "set_mapping", "reset_lora", "set_lora", "apply", "_apply_lora_to_output"):
            assert getattr(kind, name) is getattr(layers.RotatedLayer, name)
