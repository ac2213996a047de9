"""docs/fit.md comes from the committed record, its code runs, and the experiment measures what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import fit as experiment
from benchmarks import fit_report, fit_streaming
from benchmarks.fit_report import DOCUMENT, newest, text_of
from tests.guides import blocks_of, run

from roadie import embedded


def test_the_document_is_what_the_newest_record_gives() -> None:
    found = newest()
    assert found is not None
    assert DOCUMENT.read_text(encoding="utf-8") == text_of(found)
    assert found["parts"]["losses"]["settings"] == asdict(experiment.Settings())
    assert found["parts"]["streaming"]["size"] == asdict(fit_streaming.Size())
    assert found["parts"]["streaming"]["model_bytes"]["base"] > 4e9


def test_the_code_of_the_document_runs(tmp_path: Path) -> None:
    assert run(blocks_of("fit.md"), tmp_path).splitlines() == [
        "model.layers.0.self_attn.q_proj: 100.0% of a change of 33%",
        "model.layers.0.self_attn.v_proj: 100.0% of a change of 33%",
        "on these tokens: 100.0%",
    ]
    assert (tmp_path / "fitted" / "adapter_model.safetensors").is_file()


def test_private_memory_is_bounded_and_what_was_planted_is_found() -> None:
    """One block, 100 MB a model; the bound is a fifth of what both models take in float64."""
    size = fit_streaming.Size(blocks=1, hidden=2048, intermediate=5504, shard_bytes=20_000_000)
    found = fit_streaming.measure(size)
    assert found["shards"]["base"] > 2
    assert found["samples"] > 20
    assert 0 < found["private_bytes_above"] <= found["bound_bytes"] < 8 * sum(found["model_bytes"].values()) / 4
    assert found["layers"] == 7
    # bfloat16 rounds each element by 2^-9 of it at most, and rows of this length are nearly at right angles.
    assert found["largest_error"] < 2.0**-9
    assert 1 - found["share_explained"] < 1e-3


def test_the_extraction_is_a_truncated_svd() -> None:
    tuned, base = embedded.load_model(), embedded.load_model()
    path = "model.layers.0.self_attn.q_proj"
    change = torch.outer(torch.arange(256.0), torch.ones(256)) * 1e-3
    change[:, 0] += 0.01
    with torch.no_grad():
        tuned.get_submodule(path).weight.add_(change)
    extraction = experiment.Extraction.of(tuned)
    assert len(extraction.parts) == 28
    assert extraction.parameters(extraction.uniform(1)) == 19_712
    ranks = extraction.within(1024)
    assert sum(ranks.values()) == ranks[path] == 2
    assert extraction.share_explained(ranks) == pytest.approx(1, abs=1e-9)
    with torch.no_grad():
        made = extraction.model(ranks).get_submodule(path).weight
    torch.testing.assert_close(made, tuned.get_submodule(path).weight, rtol=0, atol=1e-6)
    assert not torch.equal(made, base.get_submodule(path).weight)


def test_the_gain_is_a_part_of_the_way() -> None:
    assert fit_report.gain({"loss": 3.0}, 3.0, 2.0) == 0
    assert fit_report.gain({"loss": 2.0}, 3.0, 2.0) == 1
    assert fit_report.gain({"loss": 3.5}, 3.0, 2.0) == -0.5
