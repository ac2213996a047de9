"""Each formula of powers and blends, changed once, makes a law or a value worked out by hand fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.laws import algebra as algebra_laws

from roadie.algebra import powers as algebra
from roadie.errors import AdapterError
from roadie.rotation import Rotation


def block(a: float, b: float, c: float, d: float) -> Rotation:
    return Rotation(torch.tensor([a, d], dtype=torch.float64), torch.tensor([-b, c], dtype=torch.float64), 2)


TURN, STRETCH, SHEAR = block(0.9, -0.8, 0.5, 0.3), block(1.5, 0.4, 0.7, 0.6), block(2, 3, 0, 2)
HALF_TURN, NEARLY_ONE = block(-2, 0, 0, -2), block(1.000001, 1e-7, 2e-7, 0.999999)
MIRROR, SINGULAR = block(1, 0, 0, -1), block(0.1, 0.3, 0.7, 2.1)


def logarithms() -> None:
    for rotation in (TURN, STRETCH, SHEAR, HALF_TURN, NEARLY_ONE):
        algebra_laws.check_logarithm(rotation)


def powers() -> None:
    for rotation in (TURN, STRETCH, SHEAR, HALF_TURN, NEARLY_ONE):
        algebra_laws.check_power(rotation, 0.7)


def integers() -> None:
    for exponent in (-3, -1, 0, 2, 5, 6):
        algebra_laws.check_integer_power(MIRROR, exponent)
        algebra_laws.check_integer_power(STRETCH, exponent)


def exact() -> None:
    for rotation in (TURN, STRETCH, MIRROR):
        algebra_laws.check_one_and_minus_one(rotation)
        algebra_laws.check_a_blend_of_one_is_a_power(rotation, 3.0)


def blends() -> None:
    algebra_laws.check_blend([TURN, STRETCH, SHEAR], [0.5, -0.25, 1.5])


def closed_form() -> None:
    theta, alpha = torch.tensor([[3.0], [-2.5]], dtype=torch.float64), torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    algebra_laws.check_closed_form(theta, alpha, [0.75, -1.5], 2)


def quarter_of_a_half_turn() -> None:
    eighth = algebra_laws.power(HALF_TURN, 0.25)
    wanted = torch.full((2,), 2**0.25 * math.sqrt(0.5), dtype=torch.float64)
    torch.testing.assert_close(eighth.cross, wanted, rtol=1e-15, atol=0)


def small_eigenvalues() -> None:
    """Of R^(1/2) = (R + sqrt(det) I) / sqrt(trace + 2 sqrt(det)), with det = 1, the smallest entry is right too."""
    for a, b, d in ((1e20, 0, 1e-20), (1e8, 1, 2e-8)):
        for rotation, place in ((block(a, b, b, d), 1), (block(d, b, b, a), 0)):
            smallest = algebra_laws.power(rotation, 0.5).direct[place].item()
            assert smallest == pytest.approx((d + 1) / math.sqrt(a + d + 2), rel=1e-14, abs=0)


def tiny_turns() -> None:
    turned = algebra_laws.power(Rotation(TURN.direct * 0 - 1, TURN.direct * 0 - 1e-200, 2), 0.5)
    torch.testing.assert_close(turned.cross, TURN.direct * 0 - 1, rtol=1e-15, atol=0)


def refusals() -> None:
    for rotation, reason in WITHOUT_LOGARITHM:
        assert reason in refusal(lambda rotation=rotation: algebra_laws.power(rotation, 0.5)), reason
    assert "smaller exponent" in refusal(lambda: algebra_laws.power(STRETCH, 1e4))
    assert "exponent inf" in refusal(lambda: algebra_laws.power(STRETCH, math.inf))
    assert "smaller weights" in refusal(lambda: algebra_laws.blend([STRETCH, STRETCH], [1e4, 1e4]))
    assert "weights [nan" in refusal(lambda: algebra_laws.blend([STRETCH, STRETCH], [math.nan, 0.0]))
    assert refusal(lambda: algebra_laws.power(HALF_TURN, 0.5)) == ""


WITHOUT_LOGARITHM = (
    (MIRROR, "mirrored"),
    (SINGULAR, "singular"),
    (block(1e200, 0, 0, 1e200), "too large"),
    (block(-1, 0, 0, -2), "negative eigenvalues"),
    (block(-1, 1, 0, -1), "negative eigenvalues"),
    (block(math.nan, 0, 0, 1), "parameters"),
)


def refusal(call: Callable[[], object]) -> str:
    """The message of what `call` raises; empty where it raises nothing."""
    try:
        call()
    except AdapterError as error:
        return str(error)
    return ""


MISTAKES: dict[str, tuple[str, str, Callable[[], None]]] = {
    "log: sign of the angle": ("atan2(root, middle)", "atan2(-root, middle)", logarithms),
    "log: arc tangent without quadrant": ("torch.atan2(root, middle)", "torch.atan(root / middle)", closed_form),
    "log: size of a turn": ("torch.hypot(middle, spectrum.root).log()", "middle.abs().log()", logarithms),
    "log: the larger eigenvalue": ("lower.log()", "(middle + spectrum.root).log()", logarithms),
    "log: half the stretch": ("(2 * root / lower) / (2 * root)", "(root / lower) / (2 * root)", logarithms),
    "log: slope of shears": (
        "torch.where(root > 0, rise, 1 / middle)",
        "torch.where(root > 0, rise, middle)",
        logarithms,
    ),
    "log: smaller eigenvalue by subtraction": (
        "det / (spectrum.middle + spectrum.root)",
        "spectrum.middle - spectrum.root",
        small_eigenvalues,
    ),
    "log: half turns the other way": ("half_turn, math.pi,", "half_turn, -math.pi,", quarter_of_a_half_turn),
    "log: size of half turns": ("middle.abs().log(), base", "middle * 0, base", quarter_of_a_half_turn),
    "exp: sine for cosine": ("middle.exp() * root.cos()", "middle.exp() * root.sin()", powers),
    "exp: cosine for sine": ("root.sin() / root", "root.cos() / root", powers),
    "exp: the larger eigenvalue": ("(middle - root).exp()", "(middle + root).exp()", powers),
    "exp: half the stretch": ("torch.expm1(-2 * root)", "torch.expm1(-root)", powers),
    "exp: slope of shears": ("torch.where(root > 0, rise, middle.exp())", "torch.where(root > 0, rise, 1.0)", powers),
    "exp: cross forgotten": ("slope * generator.cross", "1 * generator.cross", powers),
    "spectrum: trace for its half": (
        "(direct + partner) / 2, root * unit",
        "(direct + partner), root * unit",
        logarithms,
    ),
    "spectrum: sign of the discriminant": ("n.square() - product\n", "n.square() + product\n", logarithms),
    "spectrum: offsets that cancel": (
        "torch.where(n < 0, -product / (root - n), root + n)",
        "root + n",
        small_eigenvalues,
    ),
    "spectrum: squares that vanish": ("torch.where(size > 0, size, 1.0)", "torch.ones_like(size)", tiny_turns),
    "spectrum: offset of turns": ("torch.where(turns, n, above)", "above", logarithms),
    "integers: one squaring less": ("bit_length() - 1)", "bit_length() - 2)", integers),
    "integers: factor forgotten": ("result = compose(result, factor)", "pass", integers),
    "integers: never inverted": ("inverse(rotation) if exponent < 0 else rotation", "rotation", integers),
    "integers: to the power 0": (
        "if exponent == 0:\n        return identity_like",
        "if exponent == 0:\n        return (lambda r: r)",
        integers,
    ),
    "integers: by the logarithm": ("if float(exponent).is_integer():", "if False:", exact),
    "blend: weights forgotten": (
        "_scaled(logarithm(rotations[index]), weight)",
        "logarithm(rotations[index])",
        blends,
    ),
    "blend: one forgotten": ("in generators[1:]", "in generators[2:]", blends),
    "blend: one is not a power": ("if len(parts) == 1:", "if False:", exact),
    "blend: zeros looked at": ("if weight != 0]", "]", exact),
    "refusal: determinant": ("~((det > rounding) & torch.isfinite(det)) | negative", "negative", refusals),
    "refusal: rounding of the determinant": ("(det > rounding)", "(det > 0)", refusals),
    "refusal: negative eigenvalues": ("torch.isfinite(det)) | negative", "torch.isfinite(det))", refusals),
    "refusal: half turns too": ("~spectrum.turns & ~spectrum.is_scalar &", "~spectrum.turns &", refusals),
    "refusal: overflow of a power": (
        '_check_finite(result, f"the power',
        '(lambda *_: 0)(result, f"the power',
        refusals,
    ),
    "refusal: overflow of a blend": (
        '_check_finite(result, f"the blend',
        '(lambda *_: 0)(result, f"the blend',
        refusals,
    ),
    "refusal: exponent": ("if not math.isfinite(exponent):", "if False:", refusals),
    "refusal: weights": ("if not all(math.isfinite(weight) for weight in weights):", "if False:", refusals),
}


def mutant(old: str, new: str) -> ModuleType:
    source = Path(algebra.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in algebra.py"
    module = ModuleType(algebra.__name__)
    exec(compile(source.replace(old, new), f"mutant of {algebra.__file__}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = MISTAKES[name]
    check()
    module = mutant(old, new)
    for function in ("power", "blend", "logarithm"):
        monkeypatch.setattr(algebra_laws, function, getattr(module, function))
    with pytest.raises((AssertionError, AdapterError)):
        check()
