"""Shares of the pairs: disjoint and complete, split and joined without a bit lost, and ordinary adapters on disk."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.models import linear_chain
from tests.laws.reference import dense_rotation

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant, from_parameters, pairs_of_parameters, parameter_size, rotate, to_blocks
from roadie.share import Layout, Share, shares
from roadie.subspaces import join, restrict, split, touched_pairs, trained_places
from roadie.testing import stock_peft
from roadie.testing.rival import is_stock

VARIANTS = tuple(variant.value for variant in Variant)
LAYOUTS = tuple(layout.value for layout in Layout)
WIDTHS = {"first": 16, "second": 24, "third": 8}


def make(variant="road_1", group_size=4, seed=0, dtype=torch.float32, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for path, width in WIDTHS.items():
        theta, alpha = torch.randn(2, parameter_size(variant, width), generator=generator, dtype=torch.float64)
        parameters[path] = LayerParameters(theta.to(dtype), (1 + 0.3 * alpha).to(dtype), variant, group_size)
    settings = {"peft_type": "ROAD", "variant": variant, "group_size": group_size, "target_modules": [*WIDTHS]}
    return Adapter(parameters, {**settings, **config})


def assert_same(found: Adapter, wanted: Adapter) -> None:
    assert list(found.layers) == list(wanted.layers)
    for path, layer in wanted.layers.items():
        assert (found.layers[path].variant, found.layers[path].group_size) == (layer.variant, layer.group_size)
        for name in ("theta", "alpha"):
            got = getattr(found.layers[path], name)
            assert got.dtype == layer.theta.dtype
            assert torch.equal(got, getattr(layer, name))


@given(st.integers(1, 40), st.integers(0, 200), st.sampled_from(LAYOUTS))
def test_shares_are_disjoint_and_complete_and_equal_but_for_one(count, num_pairs, layout) -> None:
    parts = [share.pairs(num_pairs) for share in shares(count, layout)]
    assert len(parts) == count
    assert sorted(pair for part in parts for pair in part) == list(range(num_pairs))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if layout == "contiguous":
        assert [pair for part in parts for pair in part] == list(range(num_pairs))


def test_the_halves_are_those_of_the_paper() -> None:
    assert [list(share.pairs(6)) for share in shares(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(share.pairs(6)) for share in shares(2, "interleaved")] == [[0, 2, 4], [1, 3, 5]]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(LAYOUTS))
def test_a_share_is_read_as_it_is_written(index, count, layout) -> None:
    index = min(index, count)
    share = Share(index, count, layout)
    assert Share.parse(str(share)) == share == Share.parse(share)
    assert Share.parse(f" {index} / {count}  {layout} ") == share


@pytest.mark.parametrize(
    "text", ["", "half", "0/2", "3/2", "1/0", "1", "-1/2", "1/2 mirrored", "1/2/3", 0.5, None, True]
)
def test_what_is_no_share_is_refused(text) -> None:
    with pytest.raises(ConfigError, match=r"got share .*wanted .*try '1/2'"):
        Share.parse(text)


@pytest.mark.parametrize("arguments", [(1.0, 2), (True, 2), (1, 2, "mirrored"), (0, 0)])
def test_what_is_no_share_cannot_be_made(arguments) -> None:
    with pytest.raises(ConfigError, match="got share"):
        Share(*arguments)
    with pytest.raises(ConfigError, match="got share"):
        shares(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 8, 24])
def test_the_block_of_a_pair_depends_on_its_own_places_alone(variant, group_size) -> None:
    """By autograd: nothing is assumed of how the parameters are stored."""
    out_features = 24
    torch.manual_seed(0)
    theta, alpha = torch.rand(2, parameter_size(variant, out_features), dtype=torch.float64).requires_grad_()
    blocks = to_blocks(from_parameters(theta, alpha, variant, group_size))
    places = pairs_of_parameters(variant, out_features, group_size)
    assert places.dtype == torch.int64
    for pair, block in enumerate(blocks):
        gradients = torch.autograd.grad(block.sum(), (theta, alpha), retain_graph=True)
        assert torch.equal(gradients[0] != 0, places == pair)
        assert torch.equal(gradients[1] != 0, places == pair)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_joining_what_was_split_gives_every_bit_back(variant, layout, count) -> None:
    adapter = make(variant, dtype=torch.bfloat16 if count == 3 else torch.float32)
    parts = split(adapter, count, layout)
    assert len(parts) == count
    assert_same(join(parts), adapter)
    assert_same(join(parts[::-1]), adapter)
    assert dict(join(parts).config) == dict(adapter.config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_turns_its_own_pairs_and_no_others(variant, layout) -> None:
    adapter, share = make(variant, dtype=torch.float64), Share(2, 3, layout)
    part = restrict(adapter, str(share))
    for path, layer in part.layers.items():
        blocks, whole = to_blocks(layer.rotation), to_blocks(adapter.layers[path].rotation)
        chosen = list(share.pairs(len(blocks)))
        others = [pair for pair in range(len(blocks)) if pair not in chosen]
        assert torch.equal(blocks[chosen], whole[chosen])
        assert torch.equal(blocks[others], torch.eye(2, dtype=torch.float64).expand(len(others), 2, 2))
        assert touched_pairs(layer).nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize("variant", VARIANTS)
def test_joining_is_composing_in_any_order(variant) -> None:
    """Against dense products; the pairs of one are the identity in the other, so that nothing is rounded."""
    first = restrict(make(variant, seed=1, dtype=torch.float64), "1/2 interleaved")
    second = restrict(make(variant, seed=2, dtype=torch.float64), "2/2 interleaved")
    both = join([first, second])
    for path in WIDTHS:
        a, b, ab = (
            dense_rotation(layer.theta, layer.alpha, variant, layer.group_size)
            for layer in (adapter.layers[path] for adapter in (first, second, both))
        )
        assert torch.equal(a @ b, ab)
        assert torch.equal(b @ a, ab)
        x = torch.randn(3, WIDTHS[path], dtype=torch.float64)
        one_by_one = rotate(x, first.layers[path].rotation, second.layers[path].rotation)
        assert torch.equal(rotate(x, both.layers[path].rotation), one_by_one)


@pytest.mark.parametrize(("theta", "alpha"), [(0.5, 1.0), (0.0, 0.5), (0.0, -1.0), (0.5, 0.5), (0.0, float("nan"))])
def test_a_pair_is_touched_by_its_angle_or_its_scale_alone(theta, alpha) -> None:
    thetas, alphas = torch.zeros(4), torch.ones(4)
    thetas[2], alphas[2] = theta, alpha
    touched = touched_pairs(LayerParameters(thetas, alphas, "road_1", 4))
    assert touched.tolist() == [False, False, True, False]


def test_a_share_that_a_layer_is_too_small_for_is_the_identity_there() -> None:
    parts = split(make(), 9)
    assert [int(touched_pairs(part.layers["third"]).sum()) for part in parts].count(0) == 5
    assert_same(join(parts), make())


def test_disputed_pairs_are_refused_and_named() -> None:
    a, b = restrict(make(), "1/2"), restrict(make(seed=1), "1/3 interleaved")
    with pytest.raises(
        AdapterError, match=r"layer first: got 2 pairs .*\(pair 0: adapters 1, 3\); wanted disjoint.*compose"
    ):
        join([a, restrict(a, "2/2"), b])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (make("road_2"), r"layer first: got road_1.* in adapter 1 and road_2"),
        (make(group_size=8), "layer first: .*group_size=4.*group_size=8"),
        (Adapter({"first": make().layers["first"]}), "layer second: got it in one of the adapters 1 and 2 only"),
    ],
)
def test_adapters_that_are_not_alike_are_refused(other, said) -> None:
    with pytest.raises(ConfigError, match=said):
        join([restrict(make(), "1/2"), restrict(other, "2/2")])


def test_other_tensors_and_nothing_are_refused() -> None:
    head = Adapter(make().layers, {}, {"base_model.model.classifier.weight": torch.ones(2)})
    for refused in (lambda: restrict(head, "1/2"), lambda: split(head, 2), lambda: join([head])):
        with pytest.raises(
            AdapterError, match=r"1 tensors that are no rotations \(base_model.model.classifier.weight\)"
        ):
            refused()
    with pytest.raises(AdapterError, match="got no adapters"):
        join([])


@pytest.mark.parametrize(
    "mask", [torch.ones(11, dtype=torch.bool), torch.ones(12), torch.ones(12, 1, dtype=torch.bool)]
)
def test_masks_that_do_not_fit_are_refused(mask) -> None:
    with pytest.raises(ConfigError, match=r"got a mask .*wanted torch.bool \[12\]"):
        trained_places(mask, "road_1", 24, 4)


def test_settings_in_which_parts_differ_are_left_out() -> None:
    parts = split(make(base_model_name_or_path="a", task_type="CAUSAL_LM"), 2)
    other = Adapter(
        parts[1].layers, {**parts[1].config, "base_model_name_or_path": "b", "target_modules": ["first", "x"]}
    )
    config = join([parts[0], other]).config
    assert "base_model_name_or_path" not in config
    assert (config["task_type"], config["target_modules"]) == ("CAUSAL_LM", [*WIDTHS])


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_peft_loads_shares_and_what_they_join_to(variant, tmp_path) -> None:
    adapter, x = make(variant, group_size=8), torch.randn(5, 12)
    first, second = split(adapter, 2)
    for name, one in (("first", first), ("both", join([first, second]))):
        checkpoint.save(one, tmp_path / name)
        with stock_peft():
            model = peft.PeftModel.from_pretrained(linear_chain(12, *WIDTHS.values()), tmp_path / name)
            assert is_stock(model)
        y = x
        for path, layer in linear_chain(12, *WIDTHS.values()).named_children():
            y = rotate(layer(y), one.layers[path].rotation)
        # three layers of up to 24 terms, each of a few roundings of float32
        assert (model(x) - y).abs().max() <= 3 * math.sqrt(24) * 2**-22 * y.abs().max()
        assert_same(checkpoint.load(tmp_path / name), one)
