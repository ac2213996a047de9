"""Families of transformers, each as a tiny model: every part of roadie works there, or says why not; docs/families.md is true."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from tests.families import table
from tests.families.checks import row_of
from tests.families.models import ALIKE, FAMILIES, WITH_EXPERTS, Family

from roadie.experts import experts_in

DOCUMENT = table.DOCUMENT.read_text()
IS_DOCUMENTED = f"\n{transformers.__version__};" in DOCUMENT


def each_of(families: Iterable[Family]) -> pytest.MarkDecorator:
    """A test for each; those that are like another are long."""
    marks = {True: [pytest.mark.long], False: []}
    cases = [pytest.param(each, marks=marks[each.kind in ALIKE], id=each.kind) for each in families]
    return pytest.mark.parametrize("family", cases)


@each_of(FAMILIES)
def test_a_family_works_or_is_refused_with_a_reason(family: Family) -> None:
    _check(family, with_experts=False)


@each_of(each for each in FAMILIES if each.kind in WITH_EXPERTS)
def test_stacked_experts_work_or_are_refused_with_a_reason(family: Family) -> None:
    _check(family, with_experts=True)


def _check(family: Family, *, with_experts: bool) -> None:
    if not family.exists:
        pytest.skip(f"transformers {transformers.__version__} has no {family.cls}")
    if not IS_DOCUMENTED:
        try:
            family.config()
        except (ValueError, StrictDataclassError) as error:
            pytest.skip(
                f"transformers {transformers.__version__} has another configuration of {family.kind}: {error}"[:200]
            )
    row = row_of(family, with_experts=with_experts)
    if not with_experts and IS_DOCUMENTED:
        assert bool(experts_in(family.model())) == (family.kind in WITH_EXPERTS)
    if IS_DOCUMENTED:
        assert table.line(family, row) in DOCUMENT
        assert all(message in DOCUMENT for message in table.messages(family, row))


def test_there_are_sixty_families_and_each_once() -> None:
    kinds = [family.kind for family in FAMILIES]
    assert len(kinds) >= 60
    assert len(set(kinds)) == len(kinds)
    assert set(ALIKE) < set(kinds)
