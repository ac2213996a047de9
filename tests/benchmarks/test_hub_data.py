"""Rows of data sets: how they are asked for, what is missing is said, and parts share no row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from benchmarks.quality.hub import data, task
from benchmarks.quality.hub.data import read_parts
from benchmarks.quality.hub.encoding import Encoder
from benchmarks.quality.hub.settings import Model, Rows, TaskSettings
from benchmarks.quality.tasks import IGNORED

from roadie import embedded
from roadie.errors import ConfigError

ROWS = [{"question": f"q{number}", "solution": "x" * number} for number in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def settings(**changes: Any) -> TaskSettings:
    whole = {
        "title": "t",
        "published": "p",
        "model": {"name": "m", "kind": "causal-language-model"},
        "sources": {"data": {"format": "json", "files": {"train": "rows.json"}, "columns": {"query": "question"}}},
        "train": {"split": "train", "without": ["validation"]},
        "validation": {"split": "train", "rows": 3, "pick": "last"},
        "tests": {"all": {"split": "train"}},
        "rows": {"prompt": "{query}", "answer": "{solution}"},
        "metric": {"kind": "loss"},
        "training": {"steps": 1, "batch_rows": 1},
        "methods": {"road_1": [0.001]},
    }
    return TaskSettings.model_validate({**whole, **changes})


def questions(settings: TaskSettings, root: Path) -> dict[str, list[str]]:
    return {name: [row["query"] for row in table] for name, table in read_parts(settings, root).items()}


def write_rows(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")


def test_a_hub_data_set_is_loaded_with_the_documented_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*given: Any, **named: Any) -> Any:
        asked.append((given, named))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    source = {"hub": "owner/name", "config": "main", "revision": "abc", "columns": {"query": "question"}}
    read_parts(settings(sources={"data": source}), tmp_path)
    assert asked == [(("owner/name", "main"), {"split": "train", "revision": "abc"})]


def test_files_are_loaded_with_the_documented_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_rows(tmp_path)
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    real = datasets.load_dataset

    def load_dataset(*given: Any, **named: Any) -> Any:
        asked.append((given, named))
        return real(*given, **named)

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    read_parts(settings(), tmp_path)
    assert asked == [(("json",), {"data_files": [str(tmp_path / "rows.json")], "split": "train"})]


def test_parts_are_chosen_as_they_say_and_share_no_row(tmp_path: Path) -> None:
    write_rows(tmp_path)
    found = questions(settings(), tmp_path)
    assert found["validation"] == ["q7", "q8", "q9"]
    assert found["train"] == [f"q{number}" for number in range(7)]
    assert len(found["tests.all"]) == 10
    few = questions(settings(tests={"all": {"split": "train", "longest_characters": 6}}), tmp_path)
    assert few["tests.all"] == ["q0", "q1", "q2", "q3", "q4"]  # two characters of the question, and the solution
    half = settings(validation={"split": "train", "share": 0.5, "pick": "random", "pick_seed": 2})
    one, again = questions(half, tmp_path), questions(half, tmp_path)
    assert one == again
    assert sorted(one["train"] + one["validation"]) == [f"q{number}" for number in range(10)]
    assert one["validation"] not in (one["train"], [f"q{number}" for number in range(5)])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["question", "solution"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    source = {
        "format": "json" if kind == "jsonl" else kind,
        "files": {"train": path.name},
        "columns": {"query": "question"},
    }
    assert questions(settings(sources={"data": source}), tmp_path)["validation"] == ["q7", "q8", "q9"]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"got no file .*rows\.json; wanted the data there; fetch it"):
        read_parts(settings(), tmp_path)
    write_rows(tmp_path)
    with pytest.raises(ConfigError, match="with the columns question, solution; wanted answer too"):
        read_parts(settings(rows={"prompt": "{query}", "answer": "{answer}"}), tmp_path)
    with pytest.raises(ConfigError, match="validation: got 10 rows; wanted 11"):
        read_parts(settings(validation={"split": "train", "rows": 11}), tmp_path)

    def unreachable(*given: Any, **named: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(data.datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"got no split 'train' of owner/name: Couldn't reach .* hub can be reached"):
        read_parts(settings(sources={"data": {"hub": "owner/name"}}), tmp_path)


def test_a_model_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*given: Any, **named: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(task.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"got no model owner/name: We couldn't connect .* hf auth login"):
        task.prepare("x", settings(model={"name": "owner/name", "kind": "causal-language-model"}), tmp_path, "cpu")
    assert Model(name="m", kind="causal-language-model").head == ()


def test_language_rows_learn_the_answer_or_everything() -> None:
    tokenizer = embedded.load_tokenizer()
    raw = {"a": "def f(x):", "b": " return x"}
    rows = Rows(prompt="{a}", answer="{b}", reference="{b}!")
    encoder = Encoder(rows, tokenizer)
    row, prompt = encoder.row(raw), encoder.prompt(raw)
    assert tokenizer.decode(prompt, skip_special_tokens=True) == raw["a"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"] == [IGNORED] * len(prompt) + row["input_ids"][len(prompt) :]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert encoder.reference(raw) == " return x!"
    everything = Encoder(rows.model_copy(update={"learn": "all"}), tokenizer).row(raw)
    assert everything["labels"] == everything["input_ids"]
    assert tokenizer.decode(everything["input_ids"], skip_special_tokens=True) == "def f(x): return x"
    short = Encoder(rows.model_copy(update={"longest_tokens": 4}), tokenizer)
    assert len(short.row(raw)["input_ids"]) == 4
    assert short.prompt(raw) == prompt[-4:]


def test_labels_are_names_numbers_of_classes_or_numbers() -> None:
    tokenizer = embedded.load_tokenizer()
    classes = Encoder(Rows(text="t", label="y", labels=("no", "yes")), tokenizer)
    assert [classes.row({"t": "x", "y": label})["labels"] for label in ("no", "yes", 0, 1)] == [0, 1, 0, 1]
    for label in ("maybe", 2, -1, None):
        with pytest.raises(ConfigError, match="wanted one of no, yes"):
            classes.row({"t": "x", "y": label})
    numbers = Encoder(Rows(text="t", label="y", labels="number"), tokenizer)
    assert numbers.row({"t": "x", "y": "1.5"})["labels"] == 1.5
    for label in ("high", None, float("nan")):
        with pytest.raises(ConfigError, match="wanted a number"):
            numbers.row({"t": "x", "y": label})
