"""Each mistake planted in the kernels is caught by a named check of tests/kernels.

In the reference a function is replaced; the compiled kernel is built from a copy of its source with a change in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels import builds, cases
from tests.kernels.test_chain import NESTED, check_backward_in_one_call
from tests.kernels.test_schema import SLOTS, check_gradients, gradients, leaves
from torch import Tensor

from roadie.kernels import eager, schema, using
from roadie.kernels.cpu import CpuImplementation
from roadie.kernels.eager import EagerImplementation
from roadie.rotation import partner_columns

CPU, EAGER = CpuImplementation(), EagerImplementation()


def batch(size: int = 4, width: int = 72) -> cases.Batch:
    return cases.batch(6, width, size, num_slots=2, slots=(0, -1, 1, 0, 1, 1))


def forward() -> None:
    cases.check_forward(EAGER, batch())


def backward() -> None:
    cases.check_backward(EAGER, batch())


def gradients_of(keep: str, implementation: str = "eager") -> Callable[[], None]:
    def check() -> None:
        tensors = leaves(torch.float32)
        with using(implementation):
            found = gradients(keep, SLOTS["rows"], 4, tensors)
        check_gradients(found, tensors, SLOTS["rows"], 4, kept_output=keep == "output")

    return check


def compiled_gradients_of(keep: str) -> Callable[[], None]:
    """The gradient formulas that compilers are shown, which stand in `schema`."""

    def check() -> None:
        tensors = leaves(torch.float32)
        x, direct, cross = tensors
        z = torch.ops.roadie.rotate_rows(x, direct, cross, SLOTS["rows"], None, 4, keep == "output")
        weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        found = torch.autograd.grad((z * weight).sum(), tensors)
        check_gradients(found, tensors, SLOTS["rows"], 4, kept_output=keep == "output")

    return check


def other_sign(self: Any, x: Tensor) -> Tensor:
    return -partner_columns(self.group_size, x)[1] * x


def not_transposed(self: Any, g: Tensor) -> Tensor:
    return self.turned(g)


def wrong_sign_of_grad_x(self: Any, g: Tensor) -> Tensor:
    return self._but_the_base(g, self.direct * g - self.partners(self.signed(self.cross)) * self.partners(g))


def rotated_base(self: Any, x: Tensor, z: Tensor) -> Tensor:
    return z


def with_signs(which: str, direct: int, cross: int) -> Callable[..., tuple[Tensor, Tensor]]:
    of_table = getattr(eager, which)

    def mistaken(*arguments: Any) -> tuple[Tensor, Tensor]:
        grad_direct, grad_cross = of_table(*arguments)
        return direct * grad_direct, cross * grad_cross

    return mistaken


def without_partner(own: Tensor, partner: Tensor, *table: Any) -> tuple[Tensor, Tensor]:
    return eager_of_kept_output(own, -partner, *table)


eager_of_kept_output = eager.of_kept_output
_add = eager._add


def swapped_sums(sums: list[Tensor], *rest: Any) -> None:
    _add(sums[::-1], *rest)


def negative_partner(sums: list[Tensor], chosen: Any, g: Tensor, kept: Tensor) -> None:
    _add([sums[0], torch.zeros_like(sums[1])], chosen, g, kept)
    _add([torch.zeros_like(sums[0]), sums[1]], chosen, -g, kept)


REFERENCE = {
    "sign of cross": (eager._Chosen, "signed", other_sign, forward),
    "the base is rotated": (eager._Chosen, "_but_the_base", rotated_base, forward),
    "not transposed": (eager._Chosen, "turned_back", not_transposed, backward),
    "sign of grad_x": (eager._Chosen, "turned_back", wrong_sign_of_grad_x, backward),
    "own and partner swapped": (eager, "_add", swapped_sums, backward),
    "sign of partner": (eager, "_add", negative_partner, backward),
    "input: grad_direct": (eager, "of_kept_input", with_signs("of_kept_input", -1, 1), gradients_of("input")),
    "input: grad_cross": (eager, "of_kept_input", with_signs("of_kept_input", 1, -1), gradients_of("input")),
    "output: grad_direct": (eager, "of_kept_output", with_signs("of_kept_output", -1, 1), gradients_of("output")),
    "output: grad_cross": (eager, "of_kept_output", with_signs("of_kept_output", 1, -1), gradients_of("output")),
    "output: partner": (eager, "of_kept_output", without_partner, gradients_of("output")),
    "output taken for input": (eager, "of_kept_output", eager.of_kept_input, gradients_of("output")),
    "shown: grad_direct": (schema, "of_kept_input", with_signs("of_kept_input", -1, 1), compiled_gradients_of("input")),
    "shown: grad_cross": (
        schema,
        "of_kept_output",
        with_signs("of_kept_output", 1, -1),
        compiled_gradients_of("output"),
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_mistake_in_the_reference_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, mistake, check = REFERENCE[name]
    check()
    monkeypatch.setattr(place, attribute, mistake)
    with pytest.raises(AssertionError):
        check()


def alike(size: int) -> Callable[[], None]:
    """Forward and grad_x with the bits of the reference, in groups of `size`."""
    return lambda: cases.check_same_bits(CPU, EAGER, batch(size, 12 * size))


def sums(size: int) -> Callable[[], None]:
    return lambda: cases.check_sums_within_rounding(CPU, EAGER, batch(size, 12 * size))


def chained() -> Callable[[], None]:
    return lambda: check_backward_in_one_call(NESTED, torch.float32, torch.float32)


# Groups of 4 run through sixteens, of 32 through vectors of both halves, of 6 element by element.
COMPILED = {
    "sign of forward, sixteens": ("template.h", "(Words)weight ^ FIRSTS(HALF)", "(Words)weight ^ ~FIRSTS(HALF)", alike(4)),
    "sign of forward, vectors": ("template.h", "d1 * x1 - c1 * x2", "d1 * x1 + c1 * x2", alike(32)),
    "sign of forward, elements": ("template.h", "(back ? c2 : minus_c1) * x2", "(back ? c2 : c1) * x2", alike(6)),
    "sign of backward, sixteens": ("template.h", "if (back) weight = PARTNERS(weight, HALF);", "", alike(4)),
    "sign of backward, vectors": ("template.h", "d2 * x2 - c1 * x1", "d2 * x2 + c1 * x1", alike(32)),
    "sign of backward, elements": ("template.h", "(back ? minus_c1 : c2) * x1", "(back ? c1 : c2) * x1", alike(6)),
    "own and partner swapped": ("rotate.c", "own[i] = (float)total[i];", "own[i] = (float)total[width + i];", sums(6)),
    "sign of partner": ("template.h", "partner[half + i] += g2 * k1", "partner[half + i] -= g2 * k1", sums(6)),
    "partner of vectors": ("template.h", "+ g1 * k2);", "- g1 * k2);", sums(32)),
    "partner of sixteens": ("template.h", "gradient * PARTNERS(value, HALF)", "gradient * value", sums(4)),
    "rounded down": ("element.h", "0x7fffu + ((bits >> 16) & 1u)", "0u", lambda: cases.check_same_bits(CPU, EAGER, halves())),
    "gradient of cross": ("rotate.c", "partner[i] = (float)-ik", "partner[i] = (float)ik", gradients_of("input", "cpu")),
    "a stage's input": ("rotate.c", "scratch + k * columns, own, own", "scratch, own, own", chained()),
    "a stage's transpose": ("rotate.c", "cross + place, 0, width, group, 1)", "cross + place, 0, width, group, 0)", chained()),
    "solved with R": ("rotate.c", "ik = (ik * d1 - m_ii * c2)", "ik = (ik * d1 + m_ii * c2)", gradients_of("output", "cpu")),
}  # fmt: skip


def halves() -> cases.Batch:
    return cases.batch(6, 72, 6, dtype=torch.bfloat16)


@pytest.mark.skipif(builds.COMPILER is None, reason="there is no C compiler")
@pytest.mark.skipif(cases.no_compiled_kernel() is not None, reason="there is no compiled kernel")
@pytest.mark.parametrize("name", COMPILED)
def test_a_mistake_in_the_compiled_kernel_is_caught(name: str, tmp_path: Path) -> None:
    file, before, after, check = COMPILED[name]
    check()
    with builds.instead(builds.build_changed(tmp_path, file, before, after)), pytest.raises(AssertionError):
        check()
