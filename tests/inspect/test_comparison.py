"""Adapters beside each other: against dense matrices, and against `roadie.distance`."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
from tests.inspect.made import SIZES, change, drawn, one_layer

import roadie
from roadie.adapter import Adapter
from roadie.errors import AdapterError, ConfigError
from roadie.inspect import compare, share


def without(adapter: Adapter, part: str) -> Adapter:
    return Adapter({path: layer for path, layer in adapter.layers.items() if part not in path}, adapter.config)


@pytest.fixture
def adapters():
    """Four variants and shapes, among them one without some layers."""
    return {
        "one": drawn("road_1", seed=1),
        "two": drawn("road_2", seed=2, spread=0.5),
        "four": drawn("road_4", seed=3),
        "part": without(drawn("road_1", seed=4), "v_proj"),
        "other part": without(drawn("road_2", seed=5), "v_proj"),
    }


def dense_changes(adapters, first, second):
    """(change of the first, of the second) for every layer that either has."""
    paths = dict.fromkeys((*adapters[first].layers, *adapters[second].layers))
    sizes = [next(size for name, size in SIZES.items() if path.endswith(name)) for path in paths]
    return [
        tuple(change(adapters[n], path, size) for n in (first, second)) for path, size in zip(paths, sizes, strict=True)
    ]


def test_distances_and_alignments_are_those_of_the_dense_matrices(adapters):
    found = compare(adapters)
    assert found.names == tuple(adapters)
    for (i, first), (j, second) in itertools.product(enumerate(adapters), repeat=2):
        pairs = dense_changes(adapters, first, second)
        outputs = sum(len(a) for a, _ in pairs)
        squared = sum(float((a - b).square().sum()) for a, b in pairs)
        inner = sum(float((a * b).sum()) for a, b in pairs)
        lengths = [math.sqrt(sum(float(pair[n].square().sum()) for pair in pairs)) for n in (0, 1)]
        assert found.distance[i][j] == pytest.approx(math.sqrt(squared / outputs), rel=1e-12, abs=1e-15)
        assert found.alignment[i][j] == pytest.approx(inner / lengths[0] / lengths[1], rel=1e-12)


def test_the_distance_is_that_of_the_algebra(adapters):
    found = compare(adapters)
    for (i, first), (j, second) in itertools.combinations(enumerate(adapters.values()), 2):
        assert found.distance[i][j] == pytest.approx(roadie.distance(first, second), rel=1e-12)


def test_a_distance_is_a_distance(adapters):
    found = compare({**adapters, "again": adapters["one"]}).distance
    names = range(len(found))
    assert all(found[i][i] == 0 and found[0][-1] == 0 for i in names)
    assert all(found[i][j] == found[j][i] for i in names for j in names)


def test_small_distances_are_not_rounded_away():
    near = one_layer([0.5, 0.7], [1.0, 1.0]), one_layer([0.5 + 1e-10, 0.7], [1.0, 1.0])
    found = compare(dict(zip("ab", near, strict=True)))
    assert found.distance[0][1] == pytest.approx(1e-10 / math.sqrt(2), rel=1e-5)


def test_two_group_sizes_share_no_pair():
    """The diagonals meet, the rest does not: a turn by t in both is (1 - cos t)^2 of (1 - cos t)^2 + sin^2 t."""
    turn = 0.4
    pair = {
        "twos": one_layer([turn] * 4, [1.0] * 4, group_size=2),
        "fours": one_layer([turn] * 4, [1.0] * 4, group_size=4),
    }
    found = compare(pair)
    diagonal, cross = (1 - math.cos(turn)) ** 2, math.sin(turn) ** 2
    assert found.alignment[0][1] == pytest.approx(diagonal / (diagonal + cross), rel=1e-12)
    assert found.distance[0][1] == pytest.approx(math.sqrt(2 * cross), rel=1e-12)


def test_an_adapter_that_changes_nothing_has_no_alignment():
    found = compare({"still": one_layer([0.0], [1.0]), "turn": one_layer([0.3], [1.0])})
    assert found.alignment[0][1] is None
    assert found.closest.alignment is None
    assert found.closest.top_overlap is None
    assert found.layers[0].alignment is None
    json.dumps(asdict(found), allow_nan=False)


def test_the_closest_two_are_shown(adapters):
    near = drawn("road_1", seed=1, spread=0.31)
    found = compare({**adapters, "near": near})
    assert (found.closest.first, found.closest.second) == ("one", "near")
    assert found.closest.distance == pytest.approx(found.distance[0][-1], rel=1e-14)
    assert found.closest.alignment == pytest.approx(found.alignment[0][-1], rel=1e-12)
    assert found.closest.alignment > 0.99
    assert found.closest.top_overlap == 1.0


def test_agreement_of_a_layer_is_the_mean_over_pairs(adapters):
    found = compare(adapters)
    path = "model.layers.1.self_attn.v_proj"
    layer = next(layer for layer in found.layers if layer.path == path)
    changes = [change(adapters[name], path, 16) for name in ("one", "two", "four")]
    cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in itertools.combinations(changes, 2)]
    assert layer.alignment == pytest.approx(sum(cosines) / 3, rel=1e-12)
    assert layer.adapters == 3


def test_what_two_share_layer_by_layer(adapters):
    found = share(adapters, "one", "part")
    assert found.only_first == ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    assert found.only_second == ()
    missing = next(layer for layer in found.layers if layer.path in found.only_first)
    assert (missing.second_change, missing.alignment) == (0.0, None)
    assert missing.distance == missing.first_change
    for layer, (a, b) in zip(found.layers, dense_changes(adapters, "one", "part"), strict=True):
        assert layer.first_change == pytest.approx(float(a.norm()) / math.sqrt(len(a)), rel=1e-12)
        assert layer.distance == pytest.approx(float((a - b).norm()) / math.sqrt(len(a)), rel=1e-12)


def test_overlap_of_the_outputs_that_are_changed_most():
    """20 outputs, a tenth is 2: one pair. The first changes pair 0 most, the second pair 1, the third pair 0 again."""
    angles = [[0.9, 0.2], [0.2, 0.9], [0.8, 0.1]]
    made = {str(n): one_layer([*each, *[0.01] * 8], [1.0] * 10) for n, each in enumerate(angles)}
    assert share(made, "0", "1").top_overlap == 0
    assert share(made, "0", "2").top_overlap == 1


def test_other_sizes_are_other_base_models_and_refused_by_name():
    small = one_layer([0.1], [1.0])
    large = Adapter(one_layer([0.1, 0.1], [1.0, 1.0]).layers, {"base_model_name_or_path": "big/one"})
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\.0\.q_proj: got 2 outputs in small .*4 in large .*big/one"
    ):
        compare({"small": small, "large": large})


def test_one_adapter_cannot_be_compared():
    with pytest.raises(ConfigError, match="got 1 adapters; wanted two"):
        compare({"alone": drawn()})


def test_numbers_that_are_not_finite_are_refused_by_name():
    with pytest.raises(AdapterError, match=r"bad, layer model\.layers\.0\.q_proj"):
        compare({"good": one_layer([0.1], [1.0]), "bad": one_layer([math.nan], [1.0])})


def test_names_of_different_base_models_are_a_warning_and_the_embedded_one_is_one_model():
    here = drawn()
    elsewhere = drawn(base_model_name_or_path="b/other")
    (warning,) = compare({"here": here, "elsewhere": elsewhere}).warnings
    assert "here was made for a/base" in warning
    assert "elsewhere was made for b/other" in warning
    places = ("/here/roadie/embedded/model", "/there/roadie/embedded/model")
    assert compare({name: drawn(base_model_name_or_path=name) for name in places}).warnings == ()


def test_no_layer_in_common_and_other_tensors_are_warnings():
    q, v = (without(drawn(), part) for part in ("v_proj", "q_proj"))
    v = Adapter({path: layer for path, layer in v.layers.items() if "v_proj" in path}, v.config, {"x": torch.zeros(2)})
    q = Adapter({path: layer for path, layer in q.layers.items() if "q_proj" in path}, q.config)
    none, tensors = compare({"q": q, "v": v}).warnings
    assert "No layer is adapted by all" in none
    assert tensors.startswith("v: other tensors")
