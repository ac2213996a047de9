"""Each formula of the closed form, changed once, makes a comparison with dense least squares or a value by hand fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from roadie.fit import closed_form as original
from roadie.rotation import rotate_weight, to_blocks

EYE = torch.eye(2, dtype=torch.float64)
Check = Callable[[ModuleType], None]


def rows(outputs: int = 8, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    before, after = torch.randn(2, outputs, columns, generator=generator, dtype=torch.float64)
    return before * torch.logspace(-1, 1, outputs, dtype=torch.float64)[:, None], after


def general(fit: ModuleType) -> None:
    """Against lstsq, pairs (0, 2), (1, 3), (4, 6), (5, 7)."""
    before, after = rows()
    blocks = to_blocks(fit.best_rotation(fit.moments(before, after, 4), "road_2"))
    for pair, block in zip(([0, 2], [1, 3], [4, 6], [5, 7]), blocks, strict=True):
        wanted = torch.linalg.lstsq(before[pair].T, after[pair].T).solution.T
        torch.testing.assert_close(block, wanted, rtol=1e-9, atol=1e-11)


def scaled_turns(fit: ModuleType) -> None:
    before, after = rows()
    blocks = to_blocks(fit.best_rotation(fit.moments(before, after, 4), "road_1"))
    for (i, j), block in zip(((0, 2), (1, 3), (4, 6), (5, 7)), blocks, strict=True):
        h, z = torch.complex(before[i], before[j]), torch.complex(after[i], after[j])
        factor = (h.conj() * z).sum() / (h.conj() * h).sum()
        torch.testing.assert_close(block[0, 0], factor.real, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(block[1, 0], factor.imag, rtol=1e-10, atol=1e-12)
        assert block[0, 0] == block[1, 1]
        assert block[0, 1] == -block[1, 0]


def zeros(fit: ModuleType) -> None:
    before, after = rows(2)
    for variant in ("road_1", "road_2"):
        block = to_blocks(fit.best_rotation(fit.moments(0 * before, after, 2), variant))[0]
        assert torch.equal(block, EYE)


def parallel(fit: ModuleType) -> None:
    """[h, 3 h] to twice itself: least change with rows of length 1, D = [[1/2, 1/6], [3/2, 1/2]]; and [h, -h]."""
    before = rows(2)[0][:1] * torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    block = to_blocks(fit.best_rotation(fit.moments(before, 2 * before, 2), "road_2"))[0]
    torch.testing.assert_close(block - EYE, torch.tensor([[0.5, 1 / 6], [1.5, 0.5]], dtype=torch.float64))
    before = before * torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    block = to_blocks(fit.best_rotation(fit.moments(before, 2 * before, 2), "road_2"))[0]
    torch.testing.assert_close(block - EYE, torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64))


def rounded(fit: ModuleType) -> None:
    """Pairs [h, f h] of which the cosine is 1 but for rounding: D = [[1/2, 1 / 2f], [f / 2, 1/2]]."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 1, 99, generator=generator, dtype=torch.float64)
    factors = torch.rand(200, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    before = torch.cat((h, factors * h), 1).flatten(0, 1)
    changes = to_blocks(fit.best_rotation(fit.moments(before, 2 * before, 2), "road_2")) - EYE
    wanted = torch.cat((torch.cat((1 + 0 * factors, 1 / factors), 2), torch.cat((factors, 1 + 0 * factors), 2)), 1) / 2
    torch.testing.assert_close(changes, wanted, rtol=1e-12, atol=0)


def ridges(fit: ModuleType) -> None:
    """Rows at right angles, of different lengths, doubled: D = 1 / (1 + ridge)."""
    before = torch.tensor([[3.0, 0, 0], [0, 5, 0]], dtype=torch.float64)
    for variant in ("road_1", "road_2"):
        block = to_blocks(fit.best_rotation(fit.moments(before, 2 * before, 2), variant, 0.25))[0]
        torch.testing.assert_close(block, 1.8 * EYE)


def errors(fit: ModuleType) -> None:
    before, after = rows()
    found = fit.moments(before, after, 4)
    rotation = fit.best_rotation(found, "road_1")
    wanted = float((after - rotate_weight(before, rotation)).square().sum())
    assert found.squared_error(rotation) == pytest.approx(wanted, rel=1e-12)
    assert found.squared_change == pytest.approx(float((after - before).square().sum()), rel=1e-12)
    assert found.squared_norm == pytest.approx(float(before.square().sum()), rel=1e-12)
    assert found.columns == 7


def parts(fit: ModuleType) -> None:
    before, after = rows()
    both = fit.moments(before[:, :3], after[:, :3], 4) + fit.moments(before[:, 3:], after[:, 3:], 4)
    torch.testing.assert_close(both.gram, fit.moments(before, after, 4).gram)
    assert both.columns == 7


def tiles(fit: ModuleType) -> None:
    before, after = rows(8, 7)
    whole = original.moments(before, after, 4)
    fit.TILE_ELEMENTS = 8
    torch.testing.assert_close(fit.moments(before, after, 4).gram, whole.gram)


def finite(fit: ModuleType) -> None:
    bad = rows(2)[0].clone()
    bad[0, 0] = torch.inf
    assert not fit.moments(bad, bad, 2).is_finite


MISTAKES: dict[str, tuple[str, str, Check]] = {
    "turn: backwards": ("product[:, 1, 0] - product[:, 0, 1]", "product[:, 0, 1] - product[:, 1, 0]", scaled_turns),
    "turn: half of it": ("product[:, 0, 0] + product[:, 1, 1]", "product[:, 0, 0]", scaled_turns),
    "turn: one row's length": ("(rows[:, 0, 0] + rows[:, 1, 1])", "(2 * rows[:, 0, 0])", scaled_turns),
    "turn: mirrored": ("torch.stack((x, -y), -1)", "torch.stack((x, y), -1)", scaled_turns),
    "turn: nothing where nothing is": ("torch.where(squares > 0, 1 / squares, 0)", "1 / squares", zeros),
    "turn: no ridge": ("* (1 + ridge)", "", ridges),
    "block: of the wrong side": ("moments.gram[:, 2:, :2]", "moments.gram[:, :2, 2:]", general),
    "block: angle forgotten": ("(1 + cosine, 1 - cosine)", "(1 + 0 * cosine, 1 - 0 * cosine)", general),
    "block: angle of one length": ("rows[:, 0, 1] * scale[:, 0] * scale[:, 1]", "rows[:, 0, 1] * scale[:, 0] ** 2", general),
    "block: eigenvectors": ("(along - across) / 2", "(across - along) / 2", general),
    "block: twice": ("(along + across) / 2", "along + across", general),
    "block: scaled on one side": ("@ inverse * scale[:, None]", "@ inverse", general),
    "block: nothing where nothing is": ("torch.where(lengths > 0, 1 / lengths, 0)", "1 / lengths", zeros),
    "block: parallel rows": ("torch.where(value > rounding, 1 / (value + ridge), 0)", "1 / (value + ridge)", parallel),
    "block: rounding of the cosine": ("torch.finfo(torch.float64).eps", "0", rounded),
    "block: no ridge": ("1 / (value + ridge)", "1 / value", ridges),
    "rotation: no identity": ("direct = 1 + torch.stack", "direct = torch.stack", general),
    "rotation: cross of the first": ("torch.stack((-change[:, 0, 1]", "torch.stack((change[:, 0, 1]", general),
    "rotation: members": ("unflatten(1, (-1, group_size // 2))", "unflatten(1, (group_size // 2, -1)).mT", general),
    "pairs: neighbours": ("(-1, 2, group_size // 2)).transpose(1, 2)", "(-1, group_size // 2, 2))", general),
    "change: not of the base": ("after[where, columns].double() - rows", "after[where, columns].double()", general),
    "error: sign": ("torch.cat((-change,", "torch.cat((change,", errors),
    "error: of the block": ("to_blocks(rotation).double() - eye", "to_blocks(rotation).double()", errors),
    "change: norm": ("[:, 2:].sum()", "[:, :2].sum()", errors),
    "columns: rows too": ("elements // outputs", "elements", errors),
    "parts: one forgotten": ("self.gram + other.gram", "self.gram", parts),
    "parts: columns": ("self.columns + other.columns", "self.columns", parts),
    "tiles: overwritten": ("] += stacked", "] = stacked", tiles),
    "tiles: rows twice": ("slice(top, min(top + height, outputs))", "slice(top, min(top + 2 * height, outputs))", tiles),
    "finite: not looked at": ("bool(torch.isfinite(self.gram).all())", "True", finite),
}  # fmt: skip


def mutant(old: str, new: str) -> ModuleType:
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in closed_form.py"
    module = ModuleType(original.__name__)
    exec(compile(source.replace(old, new), f"mutant of {original.__file__}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str) -> None:
    old, new, check = MISTAKES[name]
    check(mutant(old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant(old, new))
