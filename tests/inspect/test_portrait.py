"""One adapter in numbers: against dense matrices, and against blocks whose turn and scale are known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tests.inspect.made import dense, drawn, one_layer

from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError
from roadie.inspect import look
from roadie.inspect.blocks import blocks_of
from roadie.inspect.positions import Position, in_order, positions_of
from roadie.rotation import to_blocks

VARIANTS = ("road_1", "road_2", "road_4")


def test_a_turn_has_its_angle_and_scale():
    blocks = blocks_of(one_layer([math.radians(30), math.radians(-100)], [1.2, 0.5]))
    assert np.degrees(blocks.angle) == pytest.approx([30, -100], rel=1e-14)
    assert blocks.scale == pytest.approx([1.2, 0.5], rel=1e-14)
    assert not blocks.is_mirrored.any()


def test_a_mirror_is_one_and_its_axis_is_at_half_of_the_angle():
    """Row 1: (cos 80, sin 80); row 2: (sin 80, -cos 80): the mirror at 40 degrees."""
    turn = math.radians(80)
    rows = one_layer([-turn, math.pi - turn], [1, 1], "road_2")
    block = to_blocks(rows.layers["model.layers.0.q_proj"].rotation)[0]
    wanted = [[math.cos(turn), math.sin(turn)], [math.sin(turn), -math.cos(turn)]]
    assert torch.allclose(block, torch.tensor(wanted, dtype=torch.float64), atol=1e-15)
    blocks = blocks_of(rows)
    assert blocks.is_mirrored.tolist() == [True]
    assert np.degrees(np.angle(blocks.mirroring[0])) == pytest.approx(80, rel=1e-14)
    assert abs(blocks.turning[0]) < 1e-15


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_angle_is_that_of_the_polar_decomposition(variant):
    adapter = drawn(variant, spread=0.8)
    blocks = blocks_of(adapter)
    matrices = torch.cat([to_blocks(layer.rotation) for layer in adapter.layers.values()])
    u, values, vh = torch.linalg.svd(matrices)
    turns = (u @ vh).numpy()
    straight = ~blocks.is_mirrored
    assert blocks.is_mirrored.tolist() == (torch.linalg.det(matrices) < 0).tolist()
    angles = np.arctan2(turns[:, 1, 0], turns[:, 0, 0])
    assert np.abs(np.exp(1j * angles) - np.exp(1j * blocks.angle))[straight].max() < 1e-9
    assert blocks.scale == pytest.approx((values.square().sum(-1) / 2).sqrt().numpy(), rel=1e-12)
    assert blocks.squared_change == pytest.approx(
        (matrices - torch.eye(2)).square().sum((-1, -2)).numpy() / 2, rel=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_measures_of_a_layer_and_of_the_whole(variant):
    adapter = drawn(variant, seed=3, spread=0.7)
    portrait = look(adapter, "it")
    total, outputs = 0.0, 0
    for layer in portrait.layers:
        matrix = dense(adapter, layer.path)
        change = matrix - torch.eye(layer.out_features, dtype=torch.float64)
        assert layer.change == pytest.approx(float(change.norm()) / math.sqrt(layer.out_features), rel=1e-12)
        blocks = blocks_of(Adapter({layer.path: adapter.layers[layer.path]}))
        logs, straight = np.log(blocks.scale), ~blocks.is_mirrored
        assert layer.log_scale == pytest.approx(logs.mean(), rel=1e-9, abs=1e-14)
        assert layer.log_scale_spread == pytest.approx(logs.std(), rel=1e-9)
        rms = math.degrees(math.sqrt((blocks.angle[straight] ** 2).mean()))
        assert layer.angle_degrees == pytest.approx(rms, rel=1e-12)
        assert layer.mirrored == (~straight).sum()
        total, outputs = total + float(change.square().sum()), outputs + layer.out_features
    assert portrait.change == pytest.approx(math.sqrt(total / outputs), rel=1e-12)
    assert portrait.outputs == outputs
    assert portrait.mirrored == sum(layer.mirrored for layer in portrait.layers)
    assert (portrait.mirrored > 0) == (variant != "road_1")
    assert portrait.parameters == adapter.num_parameters
    assert portrait.most_changed[0].change == max(layer.change for layer in portrait.layers)


def test_what_is_beyond_road_1_is_what_the_nearest_scaled_rotation_leaves():
    assert look(drawn("road_1")).beyond_road_1 == pytest.approx(0, abs=1e-30)
    adapter = drawn("road_2", layers=1)
    for layer in look(adapter).layers:
        matrices = to_blocks(adapter.layers[layer.path].rotation)
        a, b, c, d = matrices.reshape(-1, 4).T
        nearest = torch.stack([(a + d) / 2, (b - c) / 2, (c - b) / 2, (a + d) / 2], -1).reshape(-1, 2, 2)
        left = (matrices - nearest).square().sum()
        assert layer.beyond_road_1 == pytest.approx(float(left / (matrices - torch.eye(2)).square().sum()), rel=1e-12)


def test_zero_blocks_and_adapters_of_mirrors_are_told_apart_from_no_change():
    portrait = look(one_layer([0.0, 0.0], [0.0, 1.0]))
    assert (portrait.log_scale, portrait.change) == (0.0, pytest.approx(math.sqrt(0.5)))
    everything = look(one_layer([0.0, 0.0], [0.0, 0.0])).layers[0]
    assert (everything.log_scale, everything.log_scale_spread, everything.angle_degrees) == (None, None, 0.0)
    mirrors = look(one_layer([0.0, math.pi], [1.0, 1.0], "road_2")).layers[0]
    assert (mirrors.mirrored, mirrors.angle_degrees) == (1, None)
    untouched = look(one_layer([0.0], [1.0]))
    assert (untouched.change, untouched.beyond_road_1, untouched.angle_degrees) == (0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["theta", "alpha"])
def test_numbers_that_are_not_finite_are_refused_by_name(bad, which):
    values = {"theta": [0.1, 0.2], "alpha": [1.0, 1.0]}
    values[which] = [0.5, bad]
    with pytest.raises(
        AdapterError, match=r"french, layer model\.layers\.0\.q_proj: got theta or alpha that are not finite"
    ):
        look(one_layer(**values), "french")


def test_half_precision_is_read_as_what_it_is():
    theta = torch.tensor([0.3, -0.2], dtype=torch.bfloat16)
    adapter = Adapter({"q": LayerParameters(theta, torch.ones_like(theta), "road_1", 2)})
    assert blocks_of(adapter).angle == pytest.approx(theta.double().numpy(), rel=1e-14)


def test_a_portrait_is_json():
    mapping = asdict(look(drawn("road_4", spread=1.0)))
    assert json.loads(json.dumps(mapping, allow_nan=False))["layers"][0]["path"] == "model.layers.0.self_attn.q_proj"


def test_places():
    found = positions_of(
        [
            "model.layers.3.self_attn.q_proj",
            "model.layers.11.self_attn.q_proj",
            "model.layers.3.mlp.experts.7.up_proj",
            "model.layers.3.mlp.experts.8.up_proj",
            "lm_head",
        ]
    )
    assert found["model.layers.11.self_attn.q_proj"] == Position(11, "q_proj")
    assert (
        found["model.layers.3.mlp.experts.7.up_proj"]
        == found["model.layers.3.mlp.experts.8.up_proj"]
        == Position(3, "up_proj")
    )
    assert found["lm_head"] == Position(None, "lm_head")


def test_kinds_are_as_long_as_they_must_be():
    gpt2 = positions_of(["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.attn.c_attn"])
    assert [place.kind for place in gpt2.values()] == ["attn.c_proj", "mlp.c_proj", "c_attn"]
    t5 = positions_of([f"{half}.block.2.layer.0.SelfAttention.q" for half in ("encoder", "decoder")])
    assert [place.kind for place in t5.values()] == ["encoder.q", "decoder.q"]


def test_kinds_stand_in_the_order_of_use():
    assert in_order(["down_proj", "k_proj", "odd", "q_proj", "gate_proj", "o_proj"]) == [
        *("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "odd")
    ]
