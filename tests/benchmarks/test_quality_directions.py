"""Ways to a better RoAd: what they train, at which rates, from where they start, and their part of docs/quality.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from benchmarks.quality import directions_report, real_report, records
from benchmarks.quality.hub import directions, training
from benchmarks.quality.hub.methods import METHODS
from benchmarks.quality.hub.settings import Training, read
from benchmarks.quality.hub.sweep import Choice, sweep
from benchmarks.quality.methods import rate
from benchmarks.quality.real import GRID
from benchmarks.quality.tasks import LANGUAGE, Splits, Task

import roadie
from roadie import embedded

ROWS = [{"input_ids": list(range(5, 17)), "labels": list(range(5, 17))} for _ in range(8)]
TASK = Task("t", LANGUAGE, "t", embedded.load_model, Splits(ROWS, (), ()), 0, "all-linear", 2, 2)


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    return METHODS[name].adapt(embedded.load_model().requires_grad_(False), TASK)


def paths_of(model: Any) -> set[str]:
    return {path for path, module in model.get_base_model().named_modules() if isinstance(module, roadie.RoadLayer)}


def count_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_halves_share_no_layer_and_have_as_many_parameters_as_the_whole() -> None:
    whole, first, last = adapted("road_1"), adapted("road_2_first_half"), adapted("road_2_last_half")
    assert paths_of(first) | paths_of(last) == paths_of(whole)
    assert not paths_of(first) & paths_of(last)
    assert count_of(first) == count_of(last) == count_of(whole)


@pytest.mark.parametrize(("name", "layers"), [("road_attention", directions.ATTENTION), ("road_mlp", directions.MLP)])
def test_a_part_of_a_block_alone_is_rotated_by_several_variants(name: str, layers: list[str]) -> None:
    model = adapted(name)
    assert {path.rpartition(".")[2] for path in paths_of(model)} == set(layers)
    variants = {model.get_base_model().get_submodule(path).variant["default"] for path in paths_of(model)}
    assert len(variants) == 2
    assert 0.5 < count_of(model) / count_of(adapted("road_1")) < 2


@pytest.mark.parametrize(("name", "share"), [("road_1_scales_faster", 3.2), ("road_1_scales_slower", 1 / 3.2)])
def test_scales_have_a_rate_of_their_own(name: str, share: float) -> None:
    told = Training(steps=1, batch_rows=2, schedule="constant", warm_up=0, clip=0)
    moves = []
    for shares in (METHODS["road_1"].rate_shares, METHODS[name].rate_shares):
        model = adapted(name)
        layer = model.get_base_model().get_submodule(min(paths_of(model)))
        training.train(replace(TASK, steps=1), told, model, 1e-3, 0, shares)
        moves.append((layer.road_theta["default"].abs().median(), (layer.road_alpha["default"] - 1).abs().median()))
    (angle, scale), (angle_apart, scale_apart) = moves
    torch.testing.assert_close(angle_apart, angle)  # the first step of Adam goes as far as the rate says
    eps = torch.finfo(scale.dtype).eps  # of scales near 1, from which 1 is taken; a move is a product of three numbers
    torch.testing.assert_close(scale_apart, share * scale, rtol=4 * eps, atol=(1 + share) * eps)


@pytest.mark.parametrize("variant", ["road_1", "road_2"])
def test_a_start_from_lora_is_nearer_to_it_than_the_identity(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "LORA_STEPS", 3)
    seen: dict[str, torch.Tensor] = {}
    fit = directions.fit

    def looked_at(layer: Any, of: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, change = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach()
        theta, alpha = fit(layer, of)
        turned = roadie.rotate_weight(weight.double(), roadie.from_parameters(theta, alpha, of, 64))
        seen[f"{len(seen)}"] = torch.stack(((weight + change - turned).norm(), change.norm()))
        return theta, alpha

    monkeypatch.setattr(directions, "fit", looked_at)
    model = adapted(f"{variant}_from_lora")
    assert len(seen) == len(paths_of(model)) > 0
    assert all(0 < error < whole for error, whole in seen.values())
    assert count_of(model) == count_of(adapted(variant))
    layers = [model.get_base_model().get_submodule(path) for path in paths_of(model)]
    assert all(layer.road_theta["default"].abs().max() > 0 for layer in layers)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_directions_are_run_after_all_else_with_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(
        f"{json.dumps({'question': 'def', 'right': 'return'})}\n" * 4, encoding="utf-8"
    )
    told = {
        "title": "t",
        "published": "nothing",
        "model": {"name": str(embedded.model_path()), "kind": "causal-language-model"},
        "sources": {"data": {"format": "json", "files": {"rows": "rows.jsonl"}}},
        "train": {"split": "rows"},
        "validation": {"split": "rows"},
        "tests": {"test": {"split": "rows"}},
        "rows": {"prompt": "{question}:", "answer": " {right}", "longest_tokens": 64},
        "metric": {"kind": "loss"},
        "training": {"steps": 1, "batch_rows": 2},
        "methods": {"road_1": [0.01]},
        "once": {"ia3": [0.01]},
        "directions": {"road_2_last_half": [0.01]},
        "seeds": [0, 1],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tasks": {"t": told}}), encoding="utf-8")
    sweep(tmp_path / "c.yaml", Choice(data=tmp_path), tmp_path / "records", lambda: False)
    (path,) = (tmp_path / "records").glob("*.jsonl")
    order = [(one["method"], one["seed"]) for one in records.read(path)[1:]]
    assert order == [("road_1", 0), ("road_1", 1), ("ia3", 0), ("road_2_last_half", 0)]


def test_the_grid_and_the_report_know_every_direction() -> None:
    assert set(read(GRID)["mawps"].directions) == set(directions.DIRECTIONS)
    assert {*directions_report.BESIDE, *directions.DIRECTIONS} == set(directions_report.WORDS)


def searched(method: str, losses: tuple[float, ...], parameters: int) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "learning_rate": rate(exponent),
            "seed": 0,
            "parameters": parameters,
            "validation": {"loss": loss, "cost": loss},
        }
        for exponent, loss in zip(range(-5, 0), losses, strict=False)
    ]


def test_searches_that_have_ended_are_compared_with_road_1(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        *searched("road_1", (2.0, 1.5, 1.75), 1000),
        *searched("road_mlp", (2.0, 1.25, 1.75), 1100),
        *searched("road_attention", (2.0, 1.125), 1100),  # a higher rate may be better yet
    ]
    monkeypatch.setattr(
        real_report, "committed", lambda: {"mawps.Model": found, "tenants.Model": [{"task": "tenants"}]}
    )
    shown = "\n".join(directions_report.text())
    (row,) = [line for line in shown.splitlines() if line.startswith("| road_mlp")]
    assert [cell.strip() for cell in row.split("|")[3:8]] == ["1,100", "1.10", "0.01", "1.2500", "-0.2500"]
    assert "1.125" not in shown
    assert "road_attention" in shown.partition("Not finished")[2].partition("|")[0]
    monkeypatch.setattr(real_report, "committed", lambda: {"mawps.Model": found[:3]})
    assert not list(directions_report.text())
