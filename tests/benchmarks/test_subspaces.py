"""docs/subspaces.md comes from the committed record, its code runs, and the experiment measures what it says."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from benchmarks import subspaces, subspaces_report
from benchmarks.subspaces_report import ADAPTERS, DOCUMENT, newest, text_of
from tests.guides import blocks_of, run

from roadie.training.many import Plan


def test_the_document_is_what_the_newest_record_gives() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == text_of(newest())


def test_the_code_of_the_document_runs(tmp_path: Path) -> None:
    printed = run(blocks_of("subspaces.md"), tmp_path)
    first, last = map(float, re.findall(r"^cows (\S+) -> (\S+)$", printed, flags=re.MULTILINE)[0])
    assert last < first
    assert printed.endswith(" parameters were trained\n")


def test_the_jobs_file_of_the_document_is_valid() -> None:
    import yaml

    (text,) = blocks_of("subspaces.md", "yaml")
    assert [job.recipe.share for job in Plan.from_mapping(yaml.safe_load(text)).jobs] == ["1/2", "2/2"]


def test_the_record_is_of_the_whole_experiment() -> None:
    found = newest()
    settings = subspaces.Settings()
    assert found["settings"] == json.loads(json.dumps(subspaces.asdict(settings)))
    cases = [(entry["variant"], entry["seed"]) for entry in found["entries"]]
    assert cases == [(variant, seed) for variant in settings.variants for seed in settings.seeds]
    assert len(settings.seeds) == 3
    for entry in found["entries"]:
        assert list(entry["losses"]) == ["base", *entry["parameters"]]
        assert set(entry["losses"]) == set(ADAPTERS)
        counts = entry["parameters"]
        for layout in subspaces.LAYOUTS:
            assert counts[f"both-{layout}"] == counts[f"half-A-{layout}"] + counts[f"half-B-{layout}"]


def test_what_the_document_says_follows_from_the_numbers() -> None:
    """By a record whose losses are made up: the shares of the gains and the comparisons are worked out by hand."""
    made = copy.deepcopy(newest())
    made["entries"] = [entry for entry in made["entries"] if entry["variant"] == "road_1"][:2]
    for entry in made["entries"]:
        entry["losses"] = {name: {"A": 4.0, "B": 3.0} for name in ADAPTERS}
        entry["losses"]["full-A"]["A"], entry["losses"]["full-B"]["B"] = 2.0, 2.0
        entry["losses"]["half-A-contiguous"]["A"], entry["losses"]["half-B-contiguous"]["B"] = 3.0, 2.5
        entry["losses"]["half-A-interleaved"]["A"], entry["losses"]["half-B-interleaved"]["B"] = 3.0, 2.5
    made["entries"][0]["losses"]["both-contiguous"] = {"A": 3.25, "B": 3.125}
    made["entries"][1]["losses"]["both-contiguous"] = {"A": 3.75, "B": 2.875}
    text = text_of(made)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert re.search(r"\| 0.50 +\| 0.50 +\|$", rows["a half alone, of the full adapter's"])
    assert re.search(
        r"\| 0.50 \(0.25 to 0.75\) +\| 0.00 \(-0.25 to 0.25\) +\|$", rows["both halves joined, of the half's"]
    )
    assert re.search(r"\| 3.500 \(3.250 to 3.750\) +\| 3.000 \(2.875 to 3.125\) +\|$", rows["both halves joined"])
    wanted = "against the base model: -0.500 on A (lower with 2 of 2 seeds) and +0.000 on B (lower with 1 of 2 seeds)."
    assert wanted in text


def test_losses_of_the_experiment_are_those_of_an_adapted_model(tmp_path: Path) -> None:
    """A moment of it: the base's loss by the model itself, and each kind of adapter present."""
    settings = subspaces.QUICK
    (entry,) = subspaces.experiment(settings, tmp_path)
    assert set(entry["losses"]) == set(ADAPTERS)
    model = subspaces.embedded.load_model().eval()
    rows = subspaces._held_out("B", settings, tmp_path)
    with torch.no_grad():
        expected = model(**subspaces.collate(rows)).loss.item()
    assert entry["losses"]["base"]["B"] == pytest.approx(expected, rel=1e-5)
    assert len({losses["A"] for losses in entry["losses"].values()}) == len(ADAPTERS)


def test_where_there_is_no_record_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspaces_report, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="got no record"):
        newest()
