"""Mistakes planted into the source of the Triton kernels, one at a time: each makes a check fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from tests.kernels import cases
from tests.kernels.test_triton import SHAPES, check_both_at_once, small_tiles
from tests.versions import needs_loops_in_the_interpreter

from roadie.kernels.triton import TritonImplementation, backward, matmul, pairs, rotation, tasks

PACKAGE = (pairs, tasks, rotation, backward, matmul)

FORWARD, BACKWARD = cases.check_forward, cases.check_backward
AT_ONCE = check_both_at_once
ORDER = "tl.load(order + virtual // repeat, mask=mask, other=0)"
# No mistake reaches outside the tensors. Module, what stands there, what is planted, the check that must fail, and on which batch
MISTAKES = {
    "sign of z1": (pairs, "first - cross1 * second", "first + cross1 * second", FORWARD, "neighbours"),
    "sign of z2": (pairs, "second + cross2 * first", "second - cross2 * first", FORWARD, "one rotation"),
    "sign of grad_x1": (pairs, "first + cross2 * second", "first - cross2 * second", BACKWARD, "one rotation"),
    "sign of grad_x2": (pairs, "second - cross1 * first", "second + cross1 * first", BACKWARD, "sizes"),
    "not transposed": (pairs, "first + cross2 * second", "first + cross1 * second", BACKWARD, "one rotation"),
    "sign of own": (backward, "own1 += g1 * k1", "own1 -= g1 * k1", BACKWARD, "one rotation"),
    "sign of partner": (backward, "partner2 += g2 * k1", "partner2 -= g2 * k1", BACKWARD, "rows"),
    "no partner": (backward, "partner1 += g1 * k2", "partner1 += g1 * k1", BACKWARD, "one rotation"),
    "group size of slot 0": (
        rotation,
        "tl.load(sizes + tl.maximum(slot, 0)) // 2",
        "tl.load(sizes) // 2",
        FORWARD,
        "sizes",
    ),
    "halves": (pairs, "tl.join(first, second)", "tl.join(second, first)", FORWARD, "parted in registers"),
    "base rotated": (rotation, "tl.where(is_base, x1, z1.to(x1.dtype))", "z1.to(x1.dtype)", FORWARD, "rows"),
    "base turned back": (backward, "tl.where(is_base, raw1, x1.to(raw1.dtype))", "x1", BACKWARD, "rows"),
    "base in the sums": (backward, "first = tl.load(ends + slot)\n", "first = tl.load(ends)\n", BACKWARD, "repeat"),
    "a task forgotten": (backward, "mask = task < end\n", "mask = task < end - 1\n", BACKWARD, "slot 0 of two"),
    "rows not in order": (backward, ORDER, "(virtual // repeat)", BACKWARD, "repeat"),
    "sign of cross": (pairs, "of_cross1 = -partner1", "of_cross1 = partner1", AT_ONCE, "one rotation"),
    "solved with R": (pairs, "own1 * cross2 - partner1", "own1 * cross2 + partner1", AT_ONCE, "sizes"),
    "solved with another's R": (
        backward,
        "load_turn(direct, cross, slot, ",
        "load_turn(direct, cross, 0 * slot, ",
        AT_ONCE,
        "sizes",
    ),
    "runs counted as rows": (tasks, "bounds.diff() * repeat", "bounds.diff()", BACKWARD, "repeat"),
}


def changed(module: ModuleType, before: str, after: str, folder: Path) -> ModuleType:
    """The module with one piece of its source replaced; it must occur exactly once."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(before) == 1, f"{module.__name__} has {before!r} {source.count(before)} times"
    path = folder / f"planted_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def plant(mistake: ModuleType, original: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the changed functions in the place of the original ones, wherever the package has imported them."""
    originals = dict(vars(original))
    for module in PACKAGE:
        for name, value in list(vars(module).items()):
            if value is originals.get(name) and name in vars(mistake) and not name.startswith("__"):
                monkeypatch.setattr(module, name, vars(mistake)[name])


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_loops_in_the_interpreter) if check in (BACKWARD, AT_ONCE) else name
        for name, (*_, check, _) in MISTAKES.items()
    ],
)
@pytest.mark.slow
def test_a_planted_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, before, after, check, shape = MISTAKES[name]
    with small_tiles():
        check(TritonImplementation(), cases.batch(**SHAPES[shape]))
        plant(changed(module, before, after, tmp_path), module, monkeypatch)
        b = cases.batch(**SHAPES[shape])  # nothing is known of its slots
        with pytest.raises(AssertionError):
            check(TritonImplementation(), b)
