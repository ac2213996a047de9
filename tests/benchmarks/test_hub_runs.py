"""From a configuration to a report, offline: a language model that answers, an encoder that tells pairs and counts."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from benchmarks.quality import records
from benchmarks.quality.__main__ import main
from benchmarks.quality.hub.evaluation import generate
from benchmarks.quality.hub.settings import Training
from benchmarks.quality.hub.sweep import Choice, sweep
from benchmarks.quality.hub.training import backward, share_of_peak_rate, train
from benchmarks.quality.methods import METHODS
from benchmarks.quality.search import next_listed
from benchmarks.quality.tasks import LANGUAGE, Splits, Task, collate
from transformers import RobertaConfig, RobertaForSequenceClassification

from roadie import embedded
from roadie.errors import ConfigError

WORDS = ("class", "return", "import", "self")
ENCODER_TARGETS = r"roberta\.encoder\..*\.(query|key|value|dense)"


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with answers, pairs of words, and a random encoder."""
    root, drawn = tmp_path_factory.mktemp("hub"), random.Random(0)
    with (root / "questions.jsonl").open("w", encoding="utf-8") as stream:
        for word in drawn.choices(WORDS, k=48):
            stream.write(json.dumps({"question": f"Repeat {word}", "solution": f"The answer is {word}."}) + "\n")
    with (root / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["one", "two", "returns", "sum"])
        for one, two in zip(drawn.choices(WORDS[:2], k=64), drawn.choices(WORDS[:2], k=64), strict=True):
            writer.writerow([one, two, "yes" if two == "return" else "no", WORDS.index(one) + WORDS.index(two)])
    save_encoder(root / "encoder")
    return root


def save_encoder(path: Path) -> None:
    tokenizer = embedded.load_tokenizer()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that what it says of a text depends on the text
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    RobertaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def questions(**changes: Any) -> dict[str, Any]:
    return {
        "title": "words repeated",
        "published": "nothing",
        "model": {"name": str(embedded.model_path()), "kind": "causal-language-model"},
        "sources": {"data": {"format": "json", "files": {"rows": "questions.jsonl"}}},
        "train": {"split": "rows", "without": ["validation"]},
        "validation": {"split": "rows", "rows": 8},
        "tests": {"one": {"split": "rows", "rows": 8, "pick": "last"}, "two": {"split": "rows", "rows": 4}},
        "rows": {"prompt": "{question}\n", "answer": "{solution}", "longest_tokens": 64},
        "metric": {"kind": "exact_match", "pattern": r"answer is (\w+)", "wanted": r"answer is (\w+)"},
        "training": {"steps": 20, "batch_rows": 4, "accumulation": 2},
        "evaluation": {"base": True, "generated_tokens": 10},
        "methods": {"road_2": [0.03], "lora_r1": [0.01]},
        "seeds": [0, 1],
        **changes,
    }


def pairs(encoder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "title": "pairs of words",
        "published": "nothing",
        "model": {
            "name": str(encoder),
            "kind": "sequence-classification",
            "targets": ENCODER_TARGETS,
            "head": ["classifier"],
        },
        "sources": {"data": {"format": "csv", "files": {"rows": "pairs.csv"}}},
        "train": {"split": "rows", "without": ["validation"]},
        "validation": {"split": "rows", "rows": 16},
        "tests": {"test": {"split": "rows", "rows": 16, "pick": "last"}},
        "rows": {"text": "one", "second_text": "two", "label": "returns", "labels": ["no", "yes"]},
        "metric": {"kind": "matthews"},
        "training": {"epochs": 10, "batch_rows": 8, "head_rate": 0.01},
        "methods": {"road_1": [0.01, 0.03]},
        "seeds": [0],
        **changes,
    }


def written(path: Path, **tasks: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), encoding="utf-8")
    return path


def never() -> bool:
    return False


@pytest.mark.slow
@pytest.mark.long
def test_a_language_model_learns_to_answer_and_the_sweep_resumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, kept = written(tmp_path / "c.yaml", questions=questions()), tmp_path / "records"
    assert (
        sweep(config, Choice(data=folder), kept, lambda: any(len(records.read(one)) > 1 for one in kept.glob("*"))) == 1
    )
    command = ["run", "--config", str(config), "--records", str(kept), "--data", str(folder)]
    assert main(command) == 0
    (path,) = kept.glob("*.jsonl")
    found = records.read(path)
    order = [(record["method"], record["learning_rate"], record["seed"]) for record in found]
    assert order == [
        ("base", 0.0, 0),
        ("road_2", 0.03, 0),
        ("lora_r1", 0.01, 0),
        ("road_2", 0.03, 1),
        ("lora_r1", 0.01, 1),
    ]
    base, learnt = found[0]["test"], found[1]["test"]
    assert base["exact_match"] == 0.0
    assert learnt["loss"] < base["loss"] / 2
    assert learnt["sets"]["one"]["exact_match"] >= 0.75
    assert learnt["exact_match"] == pytest.approx(
        (learnt["sets"]["one"]["exact_match"] + learnt["sets"]["two"]["exact_match"]) / 2
    )
    assert learnt["sets"]["one"]["answers"][0]["generated"].startswith("The answer is")
    assert main(command) == 0
    assert records.read(path) == found
    capsys.readouterr()
    assert main(["report", "--records", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "| method  | rate | seeds | one exact_match" in printed
    assert "Without an adapter: one exact_match 0.0000, two exact_match 0.0000, mean 0.0000." in printed
    written(config, questions=questions(training={"steps": 21, "batch_rows": 8}))
    with pytest.raises(ConfigError, match=r"other settings \(training\)"):
        sweep(config, Choice(data=folder), kept, never)


def test_a_file_without_runs_is_begun_anew(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for steps in (1, 2):
        written(config, pairs=pairs(folder / "encoder", training={"steps": steps, "batch_rows": 8}))
        answers = iter([False])
        assert sweep(config, Choice(data=folder), tmp_path, lambda answers=answers: next(answers, True)) == 0
    (base,) = records.read(tmp_path / "pairs.encoder.jsonl")
    assert base["facts"]["settings"]["training"]["steps"] == 2


def test_an_encoder_learns_pairs_and_the_rate_is_chosen_by_the_metric(folder: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", pairs=pairs(folder / "encoder"))
    assert sweep(config, Choice(data=folder), tmp_path, never) == 2
    base, *found = records.read(tmp_path / "pairs.encoder.jsonl")
    assert base["facts"]["rows"] == {"train": 48, "validation": 16, "tests.test": 16}
    assert base["test"] is None  # a fresh head knows nothing
    for record in found:
        assert record["steps"] == 60
        assert record["head_parameters"] > 0
        assert record["validation"]["cost"] == -record["validation"]["matthews"]
    best = max(record["test"]["matthews"] for record in found)
    assert best > 0.9
    assert max(record["test"]["accuracy"] for record in found) > 0.9


def test_an_encoder_learns_numbers(folder: Path, tmp_path: Path) -> None:
    rows = {"text": "one", "second_text": "two", "label": "sum", "labels": "number"}
    task = pairs(folder / "encoder", rows=rows, metric={"kind": "pearson"}, methods={"road_1": [0.01]})
    sweep(written(tmp_path / "c.yaml", sums=task), Choice(data=folder), tmp_path, never)
    _, record = records.read(tmp_path / "sums.encoder.jsonl")
    assert record["test"]["pearson"] > 0.9
    assert record["test"]["loss"] < 0.2


def test_bfloat16_keeps_the_adapters_in_float32(folder: Path, tmp_path: Path) -> None:
    task = questions(
        training={"steps": 1, "batch_rows": 2, "checkpointing": True}, methods={"road_1": [0.01]}, seeds=[0]
    )
    choice = Choice(data=folder, dtype="bfloat16")
    assert sweep(written(tmp_path / "c.yaml", half=task), choice, tmp_path, never) == 1
    (path,) = tmp_path.glob("half.*.jsonl")
    base, record = records.read(path)
    assert base["facts"]["settings"]["model"]["dtype"] == "bfloat16"
    assert record["stored_bytes"] >= 4 * record["parameters"]


def test_batches_of_prompts_are_continued_as_each_alone() -> None:
    model, tokenizer = embedded.load_model().eval(), embedded.load_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("import os", "def f(self, x):\n    return", "class A")]
    told: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "end_id": tokenizer.eos_token_id, "tokens": 8}
    together = generate(model, prompts, decode=tokenizer.decode, rows=3, **told)
    assert together == [generate(model, [prompt], decode=tokenizer.decode, rows=1, **told)[0] for prompt in prompts]
    assert len(set(together)) == 3
    plain = model.generate(torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=8)[0, len(prompts[0]) :].tolist()
    end = tokenizer.eos_token_id
    assert together[0] == tokenizer.decode(plain[: plain.index(end)] if end in plain else plain)


def language_task(rows: list[list[int]], steps: int, batch_rows: int) -> Task:
    splits = Splits([{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows], (), ())
    return Task("t", LANGUAGE, "t", embedded.load_model, splits, 0, "all-linear", steps, batch_rows)


def test_a_step_is_the_same_in_pieces() -> None:
    task = language_task([list(range(5, 5 + length)) for length in (3, 9, 4, 7)], steps=1, batch_rows=4)
    rows = list(task.splits.train)
    gradients, losses = [], []
    for pieces in ([rows], [rows[:1], rows[1:2], rows[2:]]):
        model = embedded.load_model().double()
        losses.append(backward(task, model, [collate(piece, 0) for piece in pieces]))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the loss is taken in float32
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


def test_checkpointing_changes_nothing() -> None:
    task = language_task([list(range(5, 25)), list(range(30, 50))], steps=3, batch_rows=2)
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = METHODS["road_2"].adapt(embedded.load_model().requires_grad_(False), task)
        training = Training(steps=3, batch_rows=2, checkpointing=checkpointing)
        losses.append(train(task, training, model, 0.01, seed=0).losses)
        assert model.base_model.model.model.gradient_checkpointing is checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_schedules() -> None:
    def shares(schedule: str) -> list[float]:
        training = Training.model_validate({"steps": 10, "batch_rows": 1, "schedule": schedule, "warm_up": 0.2})
        return [share_of_peak_rate(training, step, 10) for step in range(11)]

    assert shares("constant") == [0.5] + [1.0] * 10
    assert shares("linear") == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
    cosine = shares("cosine")
    assert (cosine[2], cosine[6], cosine[10]) == pytest.approx((1.0, 0.5, 0.0))


def scored(rate: float, seed: int, cost: float | None, loss: float = 1.0) -> dict[str, Any]:
    scores = None if cost is None else {"loss": loss, "cost": cost}
    return {"method": "road_1", "learning_rate": rate, "seed": seed, "validation": scores}


def test_given_rates_are_tried_with_the_first_seed_then_the_best_with_the_others() -> None:
    rates, seeds = [0.01, 0.03, 0.1], [7, 8]
    assert next_listed([], "road_1", rates, seeds) == (0.01, 7)
    found = [scored(0.01, 7, -0.5, loss=2.0), scored(0.03, 7, -0.5), scored(0.1, 7, None)]
    assert next_listed(found[:1], "road_1", rates, seeds) == (0.03, 7)
    assert next_listed(found, "road_1", rates, seeds) == (0.03, 8)  # as good as 0.01, with a lower loss
    assert next_listed([*found, scored(0.03, 8, -0.1)], "road_1", rates, seeds) is None
    assert next_listed([scored(rate, 7, None) for rate in rates], "road_1", rates, seeds) is None
