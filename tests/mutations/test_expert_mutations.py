"""Each planted mistake in what stacked experts do makes a check against dense matrices fail.

mistake                                   caught by
gate and up rotated as they are stored    checks.check_forward
all rotations are the first expert's      checks.check_forward
slots of tokens by the place of a pair    checks.check_mixed_rows
rows of the base model rotated            checks.check_mixed_rows
rotations of up forgotten                 checks.check_backward
gate and up merged as they are stored     checks.check_merge
bias forgotten in a merge                 checks.check_merge
merges of both kinds taken out apart      unmerged
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.families import checks
from tests.families.models import FAMILIES
from tests.versions import needs_stacked_experts
from torch import Tensor

from roadie.experts import Pairs, Projection, forward
from roadie.testing.accuracy import relative_error
from roadie.tuner.experts import RoadExperts
from roadie.tuner.weight import StackedWeight

pytestmark = needs_stacked_experts


def adapted() -> checks.Adapted:
    """GPT-OSS: biases, weights ``[E, in, D]``, gate and up in turns."""
    return checks.Adapted.of(next(each for each in FAMILIES if each.kind == "gpt_oss"), with_experts=True)


def of(check: Callable[[checks.Adapted], None]) -> Callable[[], None]:
    return lambda: check(adapted())


def unmerged() -> None:
    model = adapted()
    model.model.base_model.set_adapter(list(checks.VARIANTS))
    with torch.no_grad():
        before = model.outputs()
        model.model.merge_adapter()
        model.model.unmerge_adapter()
        assert relative_error(model.outputs(), before) <= checks.BOUND


def as_it_is(self: Projection, y: Tensor) -> Tensor:
    return y


def of_the_first_expert(self: Pairs, *rest: Any, _spread: Callable[..., Any] = Pairs.spread) -> Any:
    return _spread(self._replace(experts=torch.zeros_like(self.experts)), *rest)


def by_place(self: Pairs, *rest: Any, _spread: Callable[..., Any] = Pairs.spread) -> Any:
    return _spread(self._replace(tokens=torch.arange(len(self.tokens)) % len(self.hidden)), *rest)


def without_base(self: Pairs, chain: Any, slots: Any, number: int, _spread: Callable[..., Any] = Pairs.spread) -> Any:
    return _spread(self, chain, None if slots is None else slots.clamp(min=0), number)


def half_of_it(
    y: Tensor, projection: Projection, *rest: Any, _turned: Callable[..., Tensor] = forward._turned
) -> Tensor:
    turned = _turned(y, projection, *rest)
    return torch.cat((turned[..., :-2], y[..., -2:]), -1) if projection.parts == 2 else turned


def end_to_end(self: Projection, stored: Tensor) -> Tensor:
    rows = stored.unsqueeze(-1) if stored.dim() == 2 else stored.mT
    return rows.unflatten(1, (self.parts, -1))


MISTAKES: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "order": (Projection, "in_order", as_it_is, of(checks.check_forward)),
    "expert": (Pairs, "spread", of_the_first_expert, of(checks.check_forward)),
    "token": (Pairs, "spread", by_place, of(checks.check_mixed_rows)),
    "base": (Pairs, "spread", without_base, of(checks.check_mixed_rows)),
    "half": (forward, "_turned", half_of_it, of(checks.check_backward)),
    "blocks": (Projection, "blocks", end_to_end, of(checks.check_merge)),
    "bias": (StackedWeight, "bias", property(lambda self: None), of(checks.check_merge)),
    "merges": (RoadExperts, "_other", lambda self: None, unmerged),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, mistake, check = MISTAKES[name]
    check()
    monkeypatch.setattr(place, attribute, mistake)
    with pytest.raises(AssertionError):
        check()
