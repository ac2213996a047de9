"""The adapter value, and how a config gives a layer its variant and group size."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadie.adapter import (
    INPUT_SUFFIX,
    MAX_NAME_LENGTH,
    RESERVED_NAMES,
    Adapter,
    LayerParameters,
    check_adapter_name,
    check_settings,
    is_input,
    layer_of,
    out_features_of,
    resolve_layer,
    rotates_input,
)
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant, parameter_size

VARIANTS = tuple(Variant)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layer(variant="road_1", out_features=8, group_size=4, dtype=torch.float32):
    num_stages = 1 if isinstance(group_size, int) else len(group_size)
    size = num_stages * parameter_size(variant, out_features)
    return LayerParameters(torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype), variant, group_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [2, 4, 16, 64])
def test_a_layer_knows_its_outputs_and_its_sizes(variant, dtype, group_size):
    parameters = layer(variant, 192, group_size, dtype)
    assert parameters.out_features == 192
    assert parameters.num_parameters == 192 * {"road_1": 1, "road_2": 2, "road_4": 4}[variant.value]
    assert parameters.nbytes == parameters.num_parameters * torch.finfo(dtype).bits // 8
    assert parameters.rotation.out_features == 192
    assert parameters.rotation.group_size == group_size


def test_the_rotation_of_a_layer_is_that_of_its_parameters():
    # One pair, a quarter turn, scaled by 2: (h1, h2) -> (-2 h2, 2 h1).
    parameters = LayerParameters(torch.tensor([math.pi / 2]), torch.tensor([2.0]), "road_1", 2)
    torch.testing.assert_close(parameters.rotation.direct, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(parameters.rotation.cross, torch.full((2,), 2.0), atol=0, rtol=0)


def test_a_variant_given_by_name_becomes_a_variant():
    assert layer("road_2").variant is Variant.ROAD_2


@pytest.mark.parametrize(
    ("theta", "alpha", "variant", "group_size", "error", "says"),
    [
        (torch.zeros(4), torch.zeros(5), "road_1", 2, AdapterError, "equal sizes"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "road_1", 2, AdapterError, "one dimension"),
        (torch.tensor(0.0), torch.tensor(0.0), "road_1", 2, AdapterError, "one dimension"),
        (torch.zeros(4), torch.zeros(4).double(), "road_1", 2, AdapterError, "one dtype"),
        (torch.zeros(4).long(), torch.zeros(4).long(), "road_1", 2, AdapterError, "one dtype"),
        (torch.zeros(4, dtype=torch.complex64),) * 2 + ("road_1", 2, AdapterError, "one dtype"),
        (torch.zeros(4), torch.zeros(4, device="meta"), "road_1", 2, AdapterError, "one device"),
        (torch.zeros(0), torch.zeros(0), "road_1", 2, AdapterError, "positive number"),
        (torch.zeros(3), torch.zeros(3), "road_4", 2, AdapterError, "even number"),
        (torch.zeros(4), torch.zeros(4), "road_1", 16, AdapterError, "8 outputs as road_1.*group_size=16"),
        (torch.zeros(4), torch.zeros(4), "road_3", 2, ConfigError, "Invalid variant"),
        (torch.zeros(4), torch.zeros(4), "road_1", 3, ConfigError, "divisible by 2"),
        (torch.zeros(4), torch.zeros(4), "road_1", True, ConfigError, "divisible by 2"),
        ([0.0], [1.0], "road_1", 2, AdapterError, "wanted tensors"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(theta, alpha, variant, group_size, error, says):
    with pytest.raises(error, match=says):
        LayerParameters(theta, alpha, variant, group_size)


@given(variant=st.sampled_from(VARIANTS), pairs=st.integers(1, 10_000))
def test_outputs_follow_from_the_size_and_the_variant(variant, pairs):
    assert out_features_of(variant, parameter_size(variant, 2 * pairs)) == 2 * pairs


def test_an_adapter_sums_up_its_layers():
    adapter = Adapter(
        {"a.q": layer("road_4", 8, 4), "b": layer("road_1", 32, 16, torch.bfloat16), "c": layer("road_4", 8, 4)},
        {"base_model_name_or_path": "some/model", "group_size": 4},
        {"base_model.model.head.weight": torch.zeros(3, 5)},
    )
    assert adapter.variants == (Variant.ROAD_1, Variant.ROAD_4)
    assert adapter.group_sizes == (4, 16)
    assert dict(adapter.out_features) == {"a.q": 8, "b": 32, "c": 8}
    assert adapter.base_model_name == "some/model"
    assert adapter.num_parameters == 32 + 32 + 32
    assert adapter.nbytes == 4 * 32 + 2 * 32 + 4 * 32 + 4 * 15


@pytest.mark.parametrize("config", [{}, {"base_model_name_or_path": None}, {"base_model_name_or_path": ""}])
def test_an_adapter_may_not_know_its_base_model(config):
    assert Adapter({"a": layer()}, config).base_model_name is None


def test_an_adapter_cannot_be_changed_and_keeps_what_it_was_given():
    layers, config, other = {"a": layer()}, {"target_modules": ["a"]}, {"x": torch.zeros(1)}
    adapter = Adapter(layers, config, other)
    layers["b"] = layer()
    config["target_modules"].append("b")
    other["y"] = torch.zeros(1)
    assert (list(adapter.layers), list(adapter.other)) == (["a"], ["x"])
    assert adapter.config["target_modules"] == ["a"]
    for mapping in (adapter.layers, adapter.config, adapter.other, adapter.out_features):
        with pytest.raises(TypeError):
            mapping["z"] = None
    with pytest.raises(AttributeError):
        adapter.layers = {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])
def test_an_adapter_is_copied_and_pickled_with_its_bits(copied):
    adapter = Adapter(
        {"a": LayerParameters(torch.randn(4), torch.randn(4), "road_1", 4)}, {"k": [1]}, {"x": torch.ones(2)}
    )
    twin = copied(adapter)
    assert torch.equal(twin.layers["a"].theta, adapter.layers["a"].theta)
    assert torch.equal(twin.layers["a"].alpha, adapter.layers["a"].alpha)
    assert torch.equal(twin.other["x"], adapter.other["x"])
    assert twin.layers["a"].theta.data_ptr() != adapter.layers["a"].theta.data_ptr()
    assert dict(twin.config) == {"k": [1]}


@pytest.mark.parametrize(
    ("layers", "config", "other", "says"),
    [
        ({}, {}, {}, "without layers"),
        ([], {}, {}, "layers of type list"),
        ({"a": torch.zeros(4)}, {}, {}, r"layers\['a'\] of type Tensor"),
        ({3: layer()}, {}, {}, "str keys"),
        ({"": layer()}, {}, {}, "non-empty names"),
        ({"a..b": layer()}, {}, {}, "non-empty names"),
        ({"a": layer()}, {3: 1}, {}, "str keys"),
        ({"a": layer()}, {}, {"x": 3}, r"other\['x'\] of type int"),
    ],
)
def test_an_adapter_of_other_kinds_is_refused(layers, config, other, says):
    with pytest.raises(AdapterError, match=says):
        Adapter(layers, config, other)


def test_without_patterns_the_settings_hold_and_default_to_pefts():
    assert resolve_layer({}, "model.q_proj", 128) == (Variant.ROAD_1, (64,))
    assert resolve_layer({"variant": "road_4", "group_size": 2}, "model.q_proj", 6) == (Variant.ROAD_4, (2,))


def test_the_first_pattern_that_matches_wins_in_the_order_of_the_mapping():
    specific_first = {"variant_pattern": {"q_proj": "road_2", ".*_proj": "road_4"}}
    general_first = {"variant_pattern": {".*_proj": "road_4", "q_proj": "road_2"}}
    assert resolve_layer(specific_first, "m.q_proj", 64)[0] is Variant.ROAD_2
    assert resolve_layer(general_first, "m.q_proj", 64)[0] is Variant.ROAD_4
    assert resolve_layer(specific_first, "m.q_proj.inner", 64)[0] is Variant.ROAD_1


PARTS = st.sampled_from(["q", "v", "q_proj", "0", "1", "layers", "xq", "mlp"])
PATTERNS = st.sampled_from(["q", "q|v", ".*q", r"layers\.0.*", r"layers\.\d+\.q", "0", "x?q", "mlp", r"\d", ".*"])


@given(path=st.lists(PARTS, min_size=1, max_size=4).map(".".join), keys=st.lists(PATTERNS, unique=True, max_size=4))
def test_patterns_match_as_pefts_do(path, keys):
    from peft.utils.other import get_pattern_key

    values = dict(zip(keys, (2, 4, 8, 16), strict=False))
    expected = values.get(get_pattern_key(keys, path), 32)
    assert resolve_layer({"group_size": 32, "group_size_pattern": values}, path, 64)[1] == (expected,)


@given(pairs=st.integers(1, 4096), half=st.integers(1, 256))
def test_an_adapting_group_size_is_the_greatest_common_divisor(pairs, half):
    out_features, group_size = 2 * pairs, 2 * half
    config = {"group_size": group_size, "adapt_group_size": True}
    (adapted,) = resolve_layer(config, "a", out_features)[1]
    assert adapted == max(d for d in range(1, group_size + 1) if group_size % d == 0 and out_features % d == 0)


@pytest.mark.parametrize(
    ("module", "expected"), [("q", (2, 16, 16)), ("k", (8, 2)), ("v", (12,)), ("up.o", (4,)), ("o", (2, 16, 16))]
)
def test_stages_hold_where_no_pattern_says_otherwise_and_adapt_one_by_one(module, expected):
    patterns = {"k": [8, 2], "v": [12], r"up\.o": [4]}
    config = {"stages": [2, 16, 64], "stages_pattern": patterns, "group_size": 32, "adapt_group_size": True}
    assert resolve_layer(config, module, 48)[1] == expected


def test_rotations_in_a_row_have_parameters_end_to_end_and_no_single_group_size():
    theta, alpha = torch.randn(24), torch.randn(24)
    layer = LayerParameters(theta, alpha, "road_1", [2, 8, 16])
    assert (layer.out_features, layer.stages) == (16, (2, 8, 16))
    for rotation, part, size in zip(layer.rotations, range(3), (2, 8, 16), strict=True):
        alone = LayerParameters(theta[8 * part : 8 * part + 8], alpha[8 * part : 8 * part + 8], "road_1", size).rotation
        assert torch.equal(rotation.direct, alone.direct)
        assert torch.equal(rotation.cross, alone.cross)
        assert rotation.group_size == size
    for asked in ("rotation", "group_size"):
        with pytest.raises(
            AdapterError, match=r"several rotations in a row \(group sizes 2, 8, 16\) where one is wanted"
        ):
            getattr(layer, asked)
    again = pickle.loads(pickle.dumps(layer))
    assert again.stages == layer.stages
    assert torch.equal(again.theta, theta)


Q = "model.layers.0.self_attn.q_proj"


def test_the_input_of_a_layer_is_a_site_with_a_path_of_its_own():
    assert (is_input(Q), is_input(Q + INPUT_SUFFIX)) == (False, True)
    assert layer_of(Q + INPUT_SUFFIX) == layer_of(Q) == Q


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"input_stages": [4]}, (4,)),
        ({"input_stages": [2, 8], "group_size": 4}, (2, 8)),
        ({"input_stages": [2, 64], "adapt_group_size": True}, (2, 8)),
        ({"input_stages": [2], "input_stages_pattern": {"q_proj": [8]}}, (8,)),
        ({"input_stages_pattern": {"v_proj": [2], ".*": [8]}}, (8,)),
        ({"input_stages": [8], "group_size_pattern": {"q_proj": 2}, "stages_pattern": {"q_proj": [2, 4]}}, (8,)),
    ],
)
def test_group_sizes_of_an_input_come_from_the_settings_for_inputs(config, expected):
    assert rotates_input(config, Q)
    assert resolve_layer(config, Q + INPUT_SUFFIX, 24) == (Variant.ROAD_1, expected)


def test_an_input_has_the_variant_of_its_layer():
    config = {"variant": "road_4", "variant_pattern": {"q_proj": "road_2"}, "input_stages": [4]}
    assert resolve_layer(config, Q + INPUT_SUFFIX, 8) == (Variant.ROAD_2, (4,))
    assert resolve_layer(config, "mlp" + INPUT_SUFFIX, 8) == (Variant.ROAD_4, (4,))


@pytest.mark.parametrize(
    "config", [{}, {"stages": [2, 4]}, {"input_stages": [4], "input_stages_pattern": {"q_proj": []}}]
)
def test_an_input_that_is_not_rotated_has_no_group_sizes(config):
    assert not rotates_input(config, Q)
    says = f"wanted input_stages, or input_stages_pattern for this layer.*Module: {re.escape(Q)}.road_input"
    with pytest.raises(ConfigError, match=says):
        resolve_layer(config, Q + INPUT_SUFFIX, 8)


def test_a_group_size_that_does_not_divide_the_inputs_says_so():
    with pytest.raises(ConfigError, match=r"in_features of the base layer .* Got in_features=24; try group_size=12"):
        resolve_layer({"input_stages": [16]}, Q + INPUT_SUFFIX, 24)
    with pytest.raises(ConfigError, match="odd number of inputs"):
        resolve_layer({"input_stages": [16], "adapt_group_size": True}, Q + INPUT_SUFFIX, 9)


def test_an_adapter_tells_inputs_from_outputs():
    plain = Adapter({Q: layer(group_size=4)})
    both = Adapter({Q: layer(group_size=4), Q + INPUT_SUFFIX: layer(out_features=32, group_size=(2, 16))})
    assert (plain.stages, plain.input_stages) == (((4,),), ())
    assert (both.stages, both.input_stages) == (((4,),), ((2, 16),))
    assert both.group_sizes == (2, 4, 16)
    assert dict(both.out_features) == {Q: 8, Q + INPUT_SUFFIX: 32}


@pytest.mark.parametrize(
    ("size", "stages", "says"),
    [(24, [2, 8, 48], "multiple of group_size=48"), (25, [2, 8, 16], "with 3 rotations in a row"), (24, [], "one or more"),
     (24, [2, 3], "divisible by 2"), (24, "28", "one or more")],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(size, stages, says):
    with pytest.raises(ValueError, match=says):
        LayerParameters(torch.zeros(size), torch.ones(size), "road_1", stages)


@pytest.mark.parametrize(("out_features", "adapt"), [(96, False), (97, True), (97, False)])
def test_a_group_size_that_cannot_fit_is_refused_with_the_name_of_the_module(out_features, adapt):
    with pytest.raises(ConfigError, match=rf"must be divisible by group_size \(64\).*{out_features}.*Module: m\.q\."):
        resolve_layer({"adapt_group_size": adapt}, "m.q", out_features)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"variant": "road_3"}, "Invalid variant road_3"),
        ({"variant": ["road_1"]}, "Invalid variant"),
        ({"group_size": 7}, "divisible by 2.*7"),
        ({"group_size": "64"}, "divisible by 2"),
        ({"group_size": 64.0}, "divisible by 2"),
        ({"variant_pattern": {"q": "road_9"}}, "Invalid variant road_9"),
        ({"variant_pattern": {"(": "road_1"}}, r"variant_pattern '\('.*not a regular expression"),
        ({"variant_pattern": ["q"]}, "variant_pattern .*wanted a mapping"),
        ({"variant_pattern": {1: "road_1"}}, "variant_pattern .*wanted a mapping"),
        ({"group_size_pattern": {"q": 3}}, "divisible by 2.*3"),
        ({"group_size_pattern": {"(": 4}}, "group_size_pattern.*not a regular expression"),
        ({"input_stages": []}, "got stages"),
        ({"input_stages_pattern": {"q": [3]}}, "divisible by 2.*3"),
        ({"input_stages_pattern": {"(": []}}, "input_stages_pattern.*not a regular expression"),
        ({"adapt_group_size": 1}, "adapt_group_size 1; wanted True or False"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(config, says):
    with pytest.raises(ConfigError, match=says):
        check_settings(config)


def test_settings_that_say_nothing_are_fine():
    check_settings({"variant_pattern": None, "group_size_pattern": {}, "unknown": object()})


@pytest.mark.parametrize("name", ["default", "a", "0", "_x", "French-2", "a" * MAX_NAME_LENGTH])
def test_plain_names_are_accepted(name):
    check_adapter_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a.b", "a/b", "..", "a b", "é", "a\n", "a" * (MAX_NAME_LENGTH + 1), None, 3, *sorted(RESERVED_NAMES)],
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"got adapter name.*wanted.*try"):
        check_adapter_name(name)


@given(st.text(max_size=12))
def test_no_name_but_those_of_the_pattern_passes(name):
    try:
        check_adapter_name(name)
    except ConfigError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name)
    assert name not in RESERVED_NAMES


def test_a_name_that_is_a_part_of_a_module_path_is_refused():
    paths = ["model.layers.0.mlp", "lm_head"]
    check_adapter_name("layer", paths)
    for name in ("layers", "0", "lm_head"):
        with pytest.raises(ConfigError, match=f"{name!r}, which is a part of the module path"):
            check_adapter_name(name, paths)
