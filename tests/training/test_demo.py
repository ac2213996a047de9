"""The demo, in its quick form: what it claims on screen is measured here again by other means."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from tests.guides import DOCS
from typer.testing import CliRunner

import roadie
from roadie import embedded
from roadie.cli.demo import demo, show_continuations, show_exactness, show_losses, show_size, wrapped
from roadie.training.demo import BASE, QUICK, DemoResult, held_out_rows, run_demo


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "adapters"


@dataclass(frozen=True)
class Shown:
    """What `roadie demo --quick` measured, and what it printed of it."""

    result: DemoResult
    text: str


@pytest.fixture(scope="module")
def shown(saved: Path) -> Shown:
    results = []

    def run(*arguments: Any) -> DemoResult:
        results.append(run_demo(*arguments))
        return results[-1]

    app = typer.Typer()
    app.command()(demo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("roadie.training.demo.run_demo", run)
        printed = CliRunner().invoke(app, ["--quick", "--output", str(saved)], env={"COLUMNS": "140"})
    assert printed.exit_code == 0, printed.output
    return Shown(results[0], printed.output)


@pytest.fixture(scope="module")
def result(shown: Shown) -> DemoResult:
    return shown.result


@pytest.fixture(scope="module")
def rounding(result: DemoResult) -> float:
    """How far float32 alone moves a logit of the embedded model: the largest difference from float64 on held-out rows."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    rows = torch.cat([held_out_rows(tokenizer, kind, QUICK)[:2] for kind in result.kinds])
    with torch.no_grad():
        single = model(input_ids=rows).logits
        assert single.dtype == torch.float32
        return (model.double()(input_ids=rows).logits - single).abs().max().item()


def reloaded(saved: Path, kind: str) -> Any:
    return roadie.PeftModel.from_pretrained(embedded.load_model(), saved / kind).eval()


def test_every_adapter_wins_on_its_own_kind(result: DemoResult):
    assert result.diagonal_wins
    assert set(result.losses) == {BASE, *result.kinds}
    for kind in result.kinds:
        others = [losses[kind] for adapter, losses in result.losses.items() if adapter != kind]
        assert result.losses[kind][kind] < min(others)
        assert result.winners[kind] == kind


def test_a_lost_diagonal_is_reported(result: DemoResult):
    first, second, _ = result.kinds
    better = {**result.losses[second], first: 0.0}
    lost = replace(result, losses={**result.losses, second: better})
    assert not lost.diagonal_wins
    assert lost.winners[first] == second


def test_the_base_row_is_the_bare_model(result: DemoResult):
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    for kind in result.kinds:
        rows = held_out_rows(tokenizer, kind, QUICK)
        with torch.no_grad():
            loss = model(input_ids=rows, labels=rows).loss.item()
        assert result.losses[BASE][kind] == pytest.approx(loss, rel=1e-5)


def test_size_is_counted_as_the_paper_counts_it(result: DemoResult):
    """road_2 has two parameters for every output of an adapted layer; road_1 has one."""
    model = embedded.load_model()
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    assert result.trainable_parameters == {"road_1": 1, "road_2": 2}[QUICK.variant] * outputs
    assert result.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 4 * result.trainable_parameters < result.adapter_bytes < 4 * result.trainable_parameters + 10_000


def test_merging_and_mixing_differ_by_rounding_only(result: DemoResult, rounding: float):
    """A merge rounds every weight once more, and unmerging it once again: a few times the rounding of the forward itself."""
    assert result.merged_difference <= 8 * rounding
    assert result.unmerged_difference <= 8 * rounding
    assert result.mixed_difference <= 8 * rounding


def test_saved_adapters_give_the_losses_of_the_table(result: DemoResult, saved: Path):
    assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == sorted(result.kinds)
    tokenizer = embedded.load_tokenizer()
    for kind in result.kinds:
        rows = held_out_rows(tokenizer, kind, QUICK)
        with torch.no_grad():
            loss = reloaded(saved, kind)(input_ids=rows, labels=rows).loss.item()
        assert loss == pytest.approx(result.losses[kind][kind], rel=1e-5)


def test_every_row_of_the_mixed_batch_writes_what_its_adapter_writes_alone(result: DemoResult, saved: Path):
    assert [row.adapter for row in result.continuations] == [BASE, *result.kinds] * len(QUICK.prompts)
    tokenizer = embedded.load_tokenizer()
    for row in result.continuations:
        model = embedded.load_model() if row.adapter == BASE else reloaded(saved, row.adapter)
        inputs = tokenizer(row.prompt, return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(
            **inputs, max_new_tokens=QUICK.new_tokens, do_sample=False, repetition_penalty=QUICK.repetition_penalty
        )
        assert tokenizer.decode(alone[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == row.text


def test_the_same_seed_gives_the_same_numbers_and_another_seed_gives_others():
    short = replace(QUICK, steps=2, rows=2, row_tokens=32, new_tokens=1, measured_rows=2)
    first, again, other = run_demo(short), run_demo(short), run_demo(replace(short, seed=1))
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert first.saved_to is None


def test_the_command_prints_sizes_table_exactness_and_the_mixed_batch(shown: Shown, saved: Path):
    for expected in (
        "trainable parameters",
        "Held-out loss",
        "every adapter wins on its own kind",
        "merged into the weights",
        "One mixed batch",
    ):
        assert expected in shown.text
    assert len(list(saved.glob("*/adapter_model.safetensors"))) == 3


def test_too_little_text_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    def too_little(*arguments: object) -> tuple[str, ...]:
        raise LookupError("the standard library at /nowhere has text for 0 kinds")

    monkeypatch.setattr(embedded.corpus, "kinds", too_little)
    monkeypatch.delattr(embedded, "load_model")
    with pytest.raises(roadie.RoadieError, match="needs real text: the standard library at /nowhere"):
        run_demo(QUICK)


PAGE = (DOCS / "tutorials" / "demo.md").read_text(encoding="utf-8")


def shape(line: str) -> str:
    """A printed line without its numbers, and without the width of the columns they stand in."""
    return re.sub(r" +", " ", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", line)).strip()


def test_the_page_shows_what_the_demo_prints(result: DemoResult):
    """Line by line, but for the numbers and the text that was generated."""
    console = Console(soft_wrap=False, highlight=False, width=80, record=True, file=io.StringIO())
    for show in (show_size, show_losses, show_exactness, show_continuations):
        show(console, result)
    printed = console.export_text().strip().split("\n")
    block = re.search(r"<!-- demo-output -->\n```text\n(.*?)\n```\n<!-- /demo-output -->", PAGE, flags=re.DOTALL)
    assert block is not None
    shown = block[1].split("\n")
    (heading,) = [index for index, line in enumerate(printed) if line.startswith("One mixed batch")]
    assert [shape(line) for line in shown[: heading + 1]] == [shape(line) for line in printed[: heading + 1]]
    generated = [line for line in shown[heading + 1 :] if " │ " in f"{line} "]
    assert [line.split("│")[0].strip() for line in generated if line.split("│")[0].strip()] == [BASE, *result.kinds]
    assert max(map(len, shown + printed)) <= 80


def test_long_lines_of_generated_text_are_broken():
    assert wrapped("a\n\n\tb" + " word" * 10, 30)[:3] == ["a", "", "    b word word word word word"]
    assert wrapped("", 30) == [""]
    assert wrapped("+" * 50, 30) == ["+" * 30, "+" * 20]
