"""Each formula of interpolation, means, differences, distances, conversions and LoRA, changed once, makes a check fail.

Only the checks that a mistake is to be caught by are run, on a module that is the source with one change in it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.laws import geometry as geometry_laws
from tests.laws.reference import dense_rotation
from torch import nn

from roadie import algebra as rotations
from roadie import lora
from roadie.adapter import Adapter, LayerParameters
from roadie.adapter_algebra import conversion, layers, operations, verbs
from roadie.algebra import geometry
from roadie.errors import RoadieError
from roadie.rotation import Rotation, from_parameters


def block(a: float, b: float, c: float, d: float) -> Rotation:
    return Rotation(torch.tensor([a, d], dtype=torch.float64), torch.tensor([-b, c], dtype=torch.float64), 2)


ONE, TWO, THREE = block(0.9, -0.8, 0.5, 0.7), block(1.5, 0.4, 0.7, 0.9), block(1.1, 0.3, -0.2, 0.8)


def turn(*degrees: float, group_size: int = 2) -> Rotation:
    theta = torch.tensor([math.radians(angle) for angle in degrees], dtype=torch.float64)
    return from_parameters(theta, torch.ones_like(theta), "road_1", group_size)


def interpolations() -> None:
    geometry_laws.check_interpolation(ONE, TWO, 1, 3)
    geometry_laws.check_the_way_back(ONE, TWO, 0.25)
    geometry_laws.check_moved_along(ONE, TWO, THREE, 0.25)


def ends() -> None:
    geometry_laws.check_ends_of_interpolation(block(0, 0, 0, 1), TWO)


def short_way() -> None:
    theta, alpha = torch.tensor([[3.0], [-3.0]], dtype=torch.float64), torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    geometry_laws.check_geodesic(theta, alpha, 0.25)


def means() -> None:
    geometry_laws.check_mean([ONE, THREE], [3, 1])


def corrected_means() -> None:
    geometry_laws.check_corrected_mean([ONE, THREE], [3, 1])


def cancelling() -> None:
    assert geometry_laws.mean([turn(30), turn(-30)], magnitude_corrected=True).cross.abs().max() < 1e-15
    assert geometry_laws.mean([turn(30), block(0, 0, 0, 0)], [1, 0], magnitude_corrected=True).cross[0] > 0.4


def differences() -> None:
    geometry_laws.check_subtraction(ONE, TWO)


def chords() -> None:
    geometry_laws.check_chordal_distance(ONE, TWO, THREE)


def geodesics() -> None:
    geometry_laws.check_geodesic_distance(ONE, TWO, THREE)


def refused(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(RoadieError, match=re.escape(reason)):
        call()


def refusals() -> None:
    for weights in ([2, -1], [0, 0], [math.inf, 1]):
        refused(lambda weights=weights: geometry_laws.mean([ONE, THREE], weights), "for a mean")
    refused(lambda: geometry_laws.mean([ONE, THREE], [1]), "2 adapters or rotations and 1 weights")
    wide = turn(20, 30)
    refused(lambda: geometry_laws.subtract(wide, turn(20, 30, group_size=4)), "share no pair")
    refused(lambda: geometry_laws.subtract(wide, turn(20)), "out_features")
    still = Rotation(torch.ones(4).double(), torch.zeros(4).double(), 4)
    assert geometry_laws.subtract(still, wide).group_size == 2


OF_GEOMETRY: dict[str, tuple[str, str, Callable[[], None]]] = {
    "interpolate: the other way": (
        "power(compose(inverse(start), end), t)",
        "power(compose(inverse(end), start), t)",
        interpolations,
    ),
    "interpolate: order of the quotient": (
        "compose(inverse(start), end), t)",
        "compose(end, inverse(start)), t)",
        interpolations,
    ),
    "interpolate: not from the start": ("return compose(start, power(", "return compose(end, power(", interpolations),
    "interpolate: logarithms at the identity": (
        "return compose(start, power(compose(inverse(start), end), t))",
        "return blend([start, end], [1 - t, t])",
        short_way,
    ),
    "interpolate: ends by inverses": ("if t in (0, 1):", "if False:", ends),
    "interpolate: ends swapped": ("return end if t else start", "return start if t else end", ends),
    "mean: weights not over their sum": ("[weight / total for weight in weights]", "weights", means),
    "mean: weights forgotten": (
        "part_of = shares(len(rotations), weights)",
        "part_of = shares(len(rotations), None)",
        means,
    ),
    "correction: forgotten": ("if magnitude_corrected else part_of", "if False else part_of", corrected_means),
    "correction: upside down": ("weight * apart / together", "weight * together / apart", corrected_means),
    "correction: without weights": ("weight * _norm(generator", "_norm(generator", corrected_means),
    "correction: cross forgotten": (
        "_norm(direct, cross)\n    if",
        "_norm(direct, 0 * cross)\n    if",
        corrected_means,
    ),
    "correction: of what cancels": ("<= len(active) * CANCELLATION * apart", "< 0", cancelling),
    "correction: zeros looked at": ("strict=True) if weight != 0]", "strict=True)]", cancelling),
    "subtract: the wrong side": (
        "return compose(rotation, inverse(removed))",
        "return compose(inverse(removed), rotation)",
        differences,
    ),
    "subtract: not inverted": (
        "return compose(rotation, inverse(removed))",
        "return compose(rotation, removed)",
        differences,
    ),
    "chordal: cross forgotten": (", first.cross - second.cross) ** 2", ", first.cross * 0) ** 2", chords),
    "chordal: not squared": ("second.cross) ** 2", "second.cross)", chords),
    "geodesic: without the inverse": (
        "logarithm(compose(inverse(first), second))",
        "logarithm(compose(first, second))",
        geodesics,
    ),
    "geodesic: moved by the wrong side": (
        "logarithm(compose(inverse(first), second))",
        "logarithm(compose(second, inverse(first)))",
        geodesics,
    ),
    "refusal: negative weights": ("and weight >= 0 for", "for", refusals),
    "refusal: all weights 0": ("or not 0 < total < math.inf", "", refusals),
    "refusal: numbers of weights": ("or len(weights) != count", "", refusals),
    "refusal: group sizes": ("if len(turning) > 1:", "if False:", refusals),
    "refusal: widths": ("if len(set(widths.values())) > 1:", "if False:", refusals),
    "pairing: of what does not turn": ("if bool(rotation.cross.any())", "if True", refusals),
}


def layer(
    variant: str = "road_2", seed: int = 0, group_size: int = 4, dtype: torch.dtype = torch.float64
) -> LayerParameters:
    sizes = {"road_1": 4, "road_2": 8, "road_4": 16}
    theta, alpha = (
        torch.randn(2, sizes[variant], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.2
    )
    return LayerParameters(theta.to(dtype), (1 + 0.3 * alpha).to(dtype), variant, group_size)


def adapter(*paths: str, variant: str = "road_2", seed: int = 0, **config: Any) -> Adapter:
    made = {path: layer(variant, seed + number) for number, path in enumerate(paths or ("a", "b"))}
    return Adapter(made, {"variant": variant, "group_size": 4, "target_modules": [*made], **config})


def matrix(of: Adapter, path: str) -> torch.Tensor:
    if path not in of.layers:
        return torch.eye(8, dtype=torch.float64)
    found = of.layers[path]
    return dense_rotation(found.theta, found.alpha, found.variant.value, found.group_size)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def adapters_combined() -> None:
    first, second = adapter("a", "b"), adapter("b", "c", seed=5)
    products = operations.compose_adapters(first, second), operations.compose_adapters(outer=second, inner=first)
    left = verbs.subtract(first, second)
    quarter = verbs.interpolate(first, second, 0.25)
    for path in "abc":
        one, two = matrix(first, path), matrix(second, path)
        close(matrix(products[0], path), one @ two)
        close(matrix(products[1], path), two @ one)
        close(matrix(left, path) @ two, one)
        close(
            torch.linalg.matrix_power(torch.linalg.solve(one, matrix(quarter, path)), 4), torch.linalg.solve(one, two)
        )


def adapters_averaged() -> None:
    first, second = adapter("a", "b"), adapter("b", "c", seed=5)
    for corrected in (False, True):
        result = operations.mean_adapters([first, second], [3, 1], magnitude_corrected=corrected)
        for path in "abc":
            parts = [
                of.layers[path].rotation if path in of.layers else turn(0, 0, 0, 0, group_size=4)
                for of in (first, second)
            ]
            wanted = rotations.mean(parts, [3, 1], magnitude_corrected=corrected)
            close(
                torch.stack((result.layers[path].rotation.direct, result.layers[path].rotation.cross)),
                torch.stack((wanted.direct, wanted.cross)),
            )


def adapters_apart() -> None:
    first, second = adapter("a", "b"), adapter("b", "c", seed=5)
    squares = {path: float((matrix(first, path) - matrix(second, path)).square().sum()) for path in "abc"}
    assert verbs.distance(first, second) == pytest.approx(math.sqrt(sum(squares.values()) / 24), rel=1e-12)


OF_OPERATIONS = {
    "compose: a layer that only one has": (
        'compose_chains(parts.get("outer", ()), parts',
        'compose_chains(parts["outer"], parts',
        adapters_combined,
    ),
    "compose: order": (
        'compose_chains(parts.get("outer", ()), parts.get("inner", ()))',
        'compose_chains(parts.get("inner", ()), parts.get("outer", ()))',
        adapters_combined,
    ),
    "mean: weights of the layers' own adapters alone": (
        "weights = list(parts.values()), [part_of[name] for name in parts]",
        "weights = list(parts.values()), [part_of[name] / sum(part_of[n] for n in parts) for name in parts]",
        adapters_averaged,
    ),
    "mean: correction forgotten": (
        "magnitude_corrected=magnitude_corrected, names",
        "magnitude_corrected=False, names",
        adapters_averaged,
    ),
}


def smallest_variants() -> None:
    road_1, road_2 = adapter(variant="road_1"), adapter(variant="road_2")
    assert [v.value for v in operations.compose_adapters(road_1, road_1).variants] == ["road_1"]
    assert [v.value for v in operations.compose_adapters(road_1, road_2).variants] == ["road_2"]
    assert [v.value for v in verbs.power(road_2, 0).variants] == ["road_1"]


def layers_refused() -> None:
    bad = adapter()
    bad.layers["b"].theta[1] = math.nan
    refused(lambda: operations.compose_adapters(bad, adapter()), "layer b: outer: got parameters that are not finite")
    large = Adapter({"a": LayerParameters(torch.zeros(8), torch.full((8,), 1e30), "road_2", 4)})
    refused(lambda: operations.compose_adapters(large, large), "too large for torch.float32")
    whole = Adapter(adapter().layers, {}, {"head": torch.zeros(1)})
    refused(lambda: verbs.distance(whole, adapter()), "no rotations")


def precision() -> None:
    narrow = Adapter({"a": layer(dtype=torch.float32)})
    assert verbs.power(narrow, 2).layers["a"].theta.dtype == torch.float32
    wide = operations.compose_adapters(Adapter({"a": layer(dtype=torch.bfloat16)}), Adapter({"a": layer()}))
    assert wide.layers["a"].theta.dtype == torch.float64


OF_LAYERS = {
    "variant: road_1 for all": ("return all(torch.equal(v,", "return True or all(torch.equal(v,", smallest_variants),
    "variant: of one layer": ("all_agree = all(", "all_agree = False and all(", smallest_variants),
    "refusal: not finite": (
        "if not bool((torch.isfinite(layer.theta)",
        "if False and bool((torch.isfinite(layer.theta)",
        layers_refused,
    ),
    "refusal: too large": ("if not bool(torch.isfinite(alpha).all()):", "if False:", layers_refused),
    "refusal: other tensors": ("    if adapter.other:", "    if False:", layers_refused),
    "precision: float32 for all": ("torch.float64 if torch.float64 in dtypes else", "", precision),
    "precision: float64 for all": ("torch.float64 in dtypes", "True", precision),
}


def bit_for_bit() -> None:
    for small, large in (("road_1", "road_2"), ("road_2", "road_4"), ("road_1", "road_4")):
        before = adapter(variant=small)
        there = conversion.convert(before, large)
        back = conversion.convert(there.adapter, small)
        assert there.is_exact
        assert back.is_exact
        for path in "ab":
            close(matrix(there.adapter, path), matrix(before, path))
            assert torch.equal(back.adapter.layers[path].theta, before.layers[path].theta)
            assert torch.equal(back.adapter.layers[path].alpha, before.layers[path].alpha)


def road_4_as_road_2() -> None:
    before = adapter(variant="road_4")
    after = conversion.convert(before, "road_2")
    assert after.is_exact
    close(matrix(after.adapter, "a"), matrix(before, "a"))


def wide(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nearest() -> None:
    before = Adapter({"a": LayerParameters(wide(0, math.pi), wide(3, 1), "road_2", 2)})
    found = conversion.convert(before, "road_1")  # [[3, 0], [0, -1]]: x = 1, y = 0, and 2^2 + 2^2 are lost of 2^2 + 2^2
    close(matrix(found.adapter, "a"), torch.eye(2, dtype=torch.float64))
    (loss,) = found.losses.values()
    assert (loss.lost, loss.change, loss.outputs, loss.mirrored) == (pytest.approx(8), pytest.approx(8), 2, 1)
    assert (found.distance, found.share_lost, found.is_exact) == (pytest.approx(2), pytest.approx(1), False)
    # [[1, 0], [4, 0]]: x = 1/2, y = 2.
    sheared = Adapter({"a": LayerParameters(wide(0, math.pi / 2), wide(1, 4), "road_2", 2)})
    close(
        matrix(conversion.convert(sheared, "road_1").adapter, "a"),
        torch.tensor([[0.5, -2], [2, 0.5]], dtype=torch.float64),
    )


def regrouped() -> None:
    still = Adapter(
        {"a": LayerParameters(torch.zeros(4), torch.tensor([1.0, -2, 3, 4]), "road_1", 4)}, {"group_size": 4}
    )
    found = conversion.convert(still, group_size=2)
    assert torch.equal(matrix(found.adapter, "a"), matrix(still, "a"))
    assert found.adapter.config["group_size"] == 2
    assert found.adapter.config["variant"] == "road_2"
    refused(lambda: conversion.convert(adapter(), group_size=2), "share no pair")
    refused(lambda: conversion.convert(still, group_size=16), "divisible")
    one = Adapter({"a": LayerParameters(torch.zeros(4), torch.ones(4), "road_1", 4)})
    assert [v.value for v in conversion.convert(one, group_size=2).adapter.variants] == ["road_1"]


OF_CONVERSION = {
    "road_2: pairs as groups": (
        "_repeated(layer, layer.group_size // 2, Variant",
        "_repeated(layer, layer.group_size, Variant",
        bit_for_bit,
    ),
    "road_4: groups as pairs": (
        "_repeated(by_row, layer.group_size, variant)",
        "_repeated(by_row, layer.group_size // 2, variant)",
        bit_for_bit,
    ),
    "back: the nearest where it is exact": ("if by_pair is not None:", "if False:", bit_for_bit),
    "back: computed where it is exact": ("return by_row or stored", "return stored", bit_for_bit),
    "back: the cosines' parameters alone": (
        "    if not all(torch.equal(values[:, 0]",
        "    if False and all(torch.equal(values[:, 0]",
        road_4_as_road_2,
    ),
    "nearest: the first row": ("(vector + swap_unsigned(vector, size)) / 2", "vector", nearest),
    "nearest: the sum": ("swap_unsigned(vector, size)) / 2", "swap_unsigned(vector, size))", nearest),
    "loss: forgotten": ("lost=0.0 if after is None else", "lost=0.0 if True else", nearest),
    "loss: change from 0": (
        "change=squared_distance(rotation, identity_like(rotation),",
        "change=squared_distance(rotation, rotation,",
        nearest,
    ),
    "loss: mirrored counted twice": ("< 0).sum()) // 2", "< 0).sum())", nearest),
    "loss: mirrored the other way": ("(determinant(rotation) < 0)", "(determinant(rotation) > 1e9)", nearest),
    "loss: distance over layers": ("sum(loss.outputs for loss", "sum(1 for loss", nearest),
    "group size: what turns too": ("if bool(rotation.cross.any()):", "if False:", regrouped),
    "group size: one that does not divide": ("check_group_size(group_size, layer.out_features)", "pass", regrouped),
    "group size: not in the config": ("return grouped_config(config, layers)", "return config", regrouped),
    "group size: never road_1": (
        "return Variant.ROAD_1 if all_agree and",
        "return Variant.ROAD_1 if False and",
        regrouped,
    ),
}


def lora_factors() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 8, dtype=torch.float64)})
    for rank in (3, 0.9):
        found = lora.to_lora(adapter("a"), model, rank)
        turned = matrix(adapter("a"), "a") - torch.eye(8, dtype=torch.float64)
        delta, values = turned @ model["a"].weight.data, torch.linalg.svdvals(turned @ model["a"].weight.data)
        up, down = (found.tensors[f"base_model.model.a.lora_{part}.weight"] for part in "BA")
        fit, share = found.fits["a"], values.square().cumsum(0) / values.square().sum()
        assert fit.rank == (3 if rank == 3 else int((share < 0.9).sum()) + 1)
        assert fit.error == pytest.approx(float(values[fit.rank :].square().sum()), rel=1e-9)
        assert float((delta - up @ down).square().sum()) == pytest.approx(fit.error, rel=1e-9)
        assert found.relative_error == pytest.approx(
            math.sqrt(float(values[fit.rank :].square().sum() / delta.square().sum()))
        )
        close(found.tensors["base_model.model.a.lora_B.bias"], turned @ model["a"].bias.data)
        assert found.config["lora_alpha"] == found.config["r"] == fit.rank


def lora_refused() -> None:
    for rank in (0, 1.5, True):
        refused(lambda rank=rank: lora.to_lora(adapter("a"), nn.ModuleDict({"a": nn.Linear(5, 8)}), rank), "got rank")
    refused(lambda: lora.to_lora(adapter("a"), nn.ModuleDict({"a": nn.Linear(5, 6)}), 1), "outputs in the model")
    refused(
        lambda: lora.to_lora(adapter("a"), nn.ModuleDict({"a": nn.Linear(5, 8, device="meta")}), 1), "no dense matrix"
    )
    broken = nn.ModuleDict({"a": nn.Linear(5, 8)})
    broken["a"].weight.data[0, 0] = math.inf
    refused(lambda: lora.to_lora(adapter("a"), broken, 1), "layer a: got a weight or parameters that are not finite")


OF_LORA = {
    "R, not R - I": ("rotation.direct - 1, rotation.cross", "rotation.direct, rotation.cross", lora_factors),
    "all singular values in both": ("root = values[:kept].sqrt()", "root = values[:kept]", lora_factors),
    "one singular value less": ("return min(rank, len(values))", "return min(rank, len(values)) - 1", lora_factors),
    "a share of the values, not their squares": (".square().cumsum(0)", ".cumsum(0)", lora_factors),
    "the error of the singular values kept": (
        "delta - up.double() @ down.double()",
        "up.double() @ down.double()",
        lora_factors,
    ),
    "the constant forgotten": ("if linear.bias is None else", "if True else", lora_factors),
    "scaled": ('"lora_alpha": rank,', '"lora_alpha": 2 * rank,', lora_factors),
    "refusal: rank": ("if not whole and not", "if False and not", lora_refused),
    "refusal: width": ("if width != layer.out_features:", "if False:", lora_refused),
    "refusal: meta": (' and weight.device.type != "meta"', "", lora_refused),
    "refusal: not finite": ("if not bool(torch.isfinite(delta).all()):", "if False:", lora_refused),
}


def one_base() -> None:
    one, two = (adapter(base_model_name_or_path=name) for name in ("llama", "qwen"))
    refused(lambda: verbs.compose(one, two), "different base models")
    verbs.compose(one, adapter())


def by_kind() -> None:
    wide, still = turn(20, 30), Rotation(torch.full((4,), 2.0).double(), torch.zeros(4).double(), 4)
    close(verbs.compose(still, wide).direct, 2 * wide.direct)
    assert verbs.distance(wide, turn(20, 31)) == pytest.approx(math.sqrt(2) * math.sin(math.radians(0.5)), rel=1e-9)
    refused(lambda: verbs.compose(wide, adapter()), "all of one kind")
    refused(lambda: verbs.inverse("a"), "all of one kind")


OF_VERBS = {
    "interpolate: from the end": (
        'interpolate_chains(_or_identities(parts, "start"), _or_identities(parts, "end"), t)',
        'interpolate_chains(_or_identities(parts, "end"), _or_identities(parts, "start"), t)',
        adapters_combined,
    ),
    "subtract: the other from the one": (
        "compose_chains(parts.get(_ONE, ()), inverse_chain(parts.get(_REMOVED, ())))",
        "compose_chains(parts.get(_REMOVED, ()), inverse_chain(parts.get(_ONE, ())))",
        adapters_combined,
    ),
    "distance: over layers, not outputs": ("/ sum(width for _, width", "/ sum(1 for _, width", adapters_apart),
    "different bases": ("    if len(names) > 1:", "    if False:", one_base),
    "no base is another base": (
        "for adapter in adapters if adapter.base_model_name}",
        "for adapter in adapters}",
        one_base,
    ),
    "kinds": ("if len(adapters) != len(parts):", "if False:", by_kind),
    "distance over pairs": ("max(first.direct.numel(), second.direct.numel())", "(first.direct.numel() // 2)", by_kind),
    "pairing": ('**in_one_pairing({"outer": outer, "inner": inner})', "outer, inner", by_kind),
}

MODULES: dict[ModuleType, dict[str, tuple[str, str, Callable[[], None]]]] = {
    geometry: OF_GEOMETRY,
    operations: OF_OPERATIONS,
    layers: OF_LAYERS,
    conversion: OF_CONVERSION,
    lora: OF_LORA,
    verbs: OF_VERBS,
}
CASES = [
    pytest.param(module, *mistake, id=f"{module.__name__.rpartition('.')[2]}: {name}")
    for module, mistakes in MODULES.items()
    for name, mistake in mistakes.items()
]


# A law that is broken, a refusal that did not come (pytest's Failed) or of what is right, or another error in its place.
CAUGHT = (
    AssertionError,
    pytest.fail.Exception,
    RoadieError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str, str], None]:
    """Plant a mistake: whoever uses a function of the module uses the changed one."""
    users = (geometry_laws, rotations, geometry, operations, layers, conversion, lora, verbs)

    def plant(module: ModuleType, old: str, new: str) -> None:
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
        mutant = ModuleType(module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, mutant)  # dataclasses look their module up
        exec(compile(source.replace(old, new), f"mutant of {module.__file__}", "exec"), mutant.__dict__)
        for user in users:
            for name, value in vars(module).items():
                if getattr(value, "__module__", None) == module.__name__ and vars(user).get(name) is value:
                    monkeypatch.setattr(user, name, getattr(mutant, name))

    return plant


@pytest.mark.parametrize(("module", "old", "new", "check"), CASES)
def test_a_planted_mistake_is_caught(
    module: ModuleType, old: str, new: str, check: Callable[[], None], planted: Callable[[ModuleType, str, str], None]
) -> None:
    check()
    planted(module, old, new)
    with pytest.raises(CAUGHT):
        check()
