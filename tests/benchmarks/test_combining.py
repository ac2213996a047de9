"""docs/combining-results.md comes from the committed record and from nothing else, and the record is made as it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from benchmarks import combining, combining_report
from benchmarks.machine import ROOT

from roadie.training import demo

DOCUMENT = ROOT / "docs" / "combining-results.md"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found = combining.newest()
    assert found is not None
    return found


def test_the_document_is_what_the_newest_record_gives(record) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == combining_report.text_of(record)
    for image in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (DOCUMENT.parent / image).exists(), image


def test_the_record_holds_everything_that_was_to_be_measured(record) -> None:
    """Three adapters: each alone and undone, six products, three pairs at three places, two means, 17 powers of each."""
    for found in record["variants"].values():
        losses = found["losses"]
        sizes = {section: len(names) for section, names in losses.items() if section != "base"}
        assert sizes == {"alone": 3, "composed": 6, "interpolated": 9, "averaged": 2, "undone": 3, "power": 51}
        assert max(combining_report.undone_by(losses).values()) <= combining_report.BOUND


def test_powers_0_and_1_are_the_base_and_the_adapter(record) -> None:
    for found in record["variants"].values():
        losses = found["losses"]
        for name, kinds in losses["alone"].items():
            curve = dict(combining_report.power_curve(losses, name))
            assert sorted(curve)[::8] == [0, 1, 2]
            assert curve[1.0] == kinds
            assert curve[0.0] == pytest.approx(losses["base"], rel=combining_report.BOUND)


def test_a_small_run_measures_what_plain_models_do() -> None:
    """Losses by a bank against those of the adapted model itself."""
    settings = demo.DemoSettings(variant="road_1", steps=1, rows=1, row_tokens=12, measured_rows=1)
    adapters = combining.train(settings)
    losses = combining.measure({"topics": adapters["topics"]}, settings)
    kinds, tokenizer = demo.installed_kinds(), demo.embedded.load_tokenizer()
    model = demo.attach_adapters(demo.embedded.load_model(), kinds, settings)
    demo.train_adapter(model, "topics", tokenizer, settings, lambda *_: None)
    wanted = demo.held_out_losses(model.eval(), tokenizer, kinds, settings)
    assert losses["base"]["topics"] == pytest.approx(wanted[demo.BASE]["topics"], rel=1e-6)
    assert losses["alone"]["topics"]["topics"] == pytest.approx(wanted["topics"]["topics"], rel=1e-5)


def test_a_loss_above_the_base_is_marked_and_refusals_are_shown() -> None:
    table = combining_report._table(
        {"base": {"a": 2.0, "b": 2.0}, "x": {"a": 1.0, "b": 3.0}, "y": {"refused": "no logarithm"}},
        {"a": 2.0, "b": 2.0},
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[2:] == [
        ["base", "2.000", "2.000*", "2.000*"],
        ["x", "1.000*", "_3.000_", "2.000*"],
        ["y", "refused", "refused", "refused"],
    ]
