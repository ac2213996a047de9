"""Configurations: those that are shipped are whole, and what cannot be meant is refused before anything is loaded."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.machine import ROOT
from benchmarks.quality.__main__ import main
from benchmarks.quality.hub.methods import METHODS
from benchmarks.quality.hub.settings import deep_merge, names_in, read
from benchmarks.quality.hub.sweep import Choice, chosen_tasks

from roadie.errors import ConfigError

CONFIGS = sorted((ROOT / "benchmarks" / "quality" / "configs").glob("*.yaml"))
GLUE = {f"glue-{name}" for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")}
TASKS = {*GLUE, "commonsense", "arithmetic", "gsm8k-road", "gsm8k-lora", "gsm8k-recipe"}

TASK: dict[str, Any] = {
    "title": "t",
    "published": "p",
    "model": {"name": "m", "kind": "sequence-classification", "head": ["classifier"]},
    "sources": {"data": {"hub": "owner/name"}},
    "train": {"split": "train"},
    "validation": {"split": "validation"},
    "tests": {"test": {"split": "test"}},
    "rows": {"text": "sentence", "label": "label", "labels": ["no", "yes"]},
    "metric": {"kind": "accuracy"},
    "training": {"steps": 1, "batch_rows": 1},
    "methods": {"road_1": [0.001]},
}


def written(folder: Path, task: dict[str, Any]) -> Path:
    path = folder / "one.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"one": task}}), encoding="utf-8")
    return path


def test_the_shipped_configurations_are_valid() -> None:
    tasks = {name: task for path in CONFIGS for name, task in read(path).items()}
    assert set(tasks) == TASKS
    for task in tasks.values():
        assert set(task.methods) <= set(METHODS)
        assert task.published
        assert len(task.seeds) >= 3


def test_the_shipped_configurations_say_where_their_figures_come_from() -> None:
    for path in CONFIGS:
        head = path.read_text(encoding="utf-8").partition("defaults:")[0]
        assert all(line.startswith("#") for line in head.splitlines())
        assert "Published" in head


def test_glue_differs_by_task_where_it_has_to() -> None:
    tasks = read(next(path for path in CONFIGS if path.stem == "glue"))
    assert {name: task.sources["data"].config for name, task in tasks.items()} == {
        name: name.removeprefix("glue-") for name in GLUE
    }
    assert tasks["glue-cola"].metric.kind == "matthews"
    assert tasks["glue-stsb"].rows.labels == "number"
    assert tasks["glue-mnli"].tests["rest"].split == "validation_matched"
    assert (tasks["glue-qnli"].validation.rows, tasks["glue-rte"].validation.share) == (1000, 0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"titel": "t"}, "titel: got an unknown key"),
        ({"model": {"nmae": "m"}}, "model.nmae: got an unknown key"),
        ({"methods": {"raod_1": [0.1]}}, "got methods raod_1; wanted some of road_1"),
        ({"methods": {"road_1": []}}, "each with rates"),
        ({"methods": {"road_1": [-1]}}, "greater than 0"),
        ({"training": {"epochs": 1}}, "wanted steps or epochs"),
        ({"sources": {"data": {"hub": None}}}, "wanted either hub or files"),
        ({"sources": {"data": {"hub": None, "format": "csv", "files": {"train": "a.csv"}}}}, "got split 'validation'"),
        ({"train": {"source": "elsewhere"}}, "got source 'elsewhere'; wanted one of data"),
        ({"train": {"rows": 2, "share": 0.5}}, "wanted rows or share"),
        ({"metric": {"kind": "pearson"}}, "got metric pearson; wanted one of loss, accuracy"),
        ({"metric": {"kind": "exact_match"}}, "wanted a pattern for exact_match"),
        ({"rows": {"prompt": "{question}"}}, "rows: wanted text, label, labels"),
        ({"rows": {"labels": None}}, "add ['labels']"),
        ({"model": {"head": []}}, "model.head: wanted"),
        ({"tests": {"test": {"metric": {"kind": "exact_match", "pattern": "("}}}}, "it does not compile"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"validation": {"without": ["validation"]}}, "wanted validation chosen first"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert set(read(written(tmp_path, TASK))) == {"one"}
    with pytest.raises(ConfigError) as raised:
        read(written(tmp_path, deep_merge(TASK, changes)))
    assert words in str(raised.value)
    assert "one.yaml, task one" in str(raised.value)


@pytest.mark.parametrize(
    "text", ["- 1", "tasks: {}", "other: {}", "tasks: {a b: {}}", "tasks: {a: 1}", "{", "!!python/name:os.system"]
)
def test_files_of_another_shape_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        read(path)
    with pytest.raises(ConfigError, match="no file that can be read"):
        read(tmp_path / "absent.yaml")


def test_templates_take_names_of_columns_only() -> None:
    assert names_in("{{}} {question}: {my column}\n") == ("question", "my column")
    for template in ("{question.__class__}", "{0[a]}", "{}", "{question!r}", "{question:>9}"):
        with pytest.raises(ValueError, match="plain names"):
            names_in(template)


def test_a_choice_changes_model_methods_and_seeds(tmp_path: Path) -> None:
    path = written(tmp_path, {**TASK, "seeds": [5, 6, 7]})
    choice = Choice(methods=["road_2"], seeds=2, model="owner/other", dtype="bfloat16")
    ((name, task),) = chosen_tasks(path, choice).items()
    assert (name, task.seeds, dict(task.methods)) == ("one.other", (5, 6), {"road_2": "search"})
    assert (task.model.name, task.model.dtype) == ("owner/other", "bfloat16")
    for bad in (Choice(methods=["x"]), Choice(tasks=["x"]), Choice(seeds=4), Choice(seeds=0)):
        with pytest.raises(ConfigError, match="wanted"):
            chosen_tasks(path, bad)


def test_the_command_line_checks_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(written(tmp_path, TASK)), "--check"]) == 0
    assert "road_1: 0.001" in capsys.readouterr().out
    assert main(["run", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert main(["run", "--method", "road_1"]) == 2
    assert main(["report", "--records", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: got") == 2


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "quality-hub.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_guide_are_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    runs = [words[3:] for words in commands if words[:4] == ["python", "-m", "benchmarks.quality", "run"]]
    assert len(runs) == 6
    for arguments in runs:
        assert main([*arguments, "--check"]) == 0
        assert "seeds" in capsys.readouterr().out
    others = [words for words in commands if words[3:] not in runs]
    assert {tuple(words[:3]) for words in others} == {
        ("python", "-m", "benchmarks.models"),
        ("python", "-m", "benchmarks.quality"),
    }
    for _, _, module, *arguments in others:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module if module.endswith("models") else f"{module}.__main__").main(
                [*arguments, "--help"]
            )
        assert ended.value.code == 0


def test_the_configuration_of_the_guide_is_valid(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "guide.yaml").write_text(example, encoding="utf-8")
    (task,) = read(tmp_path / "guide.yaml").values()
    assert task.methods["lora_r8"] == "search"
