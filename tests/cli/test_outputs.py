"""Places that cannot be written are refused before anything is loaded, whatever the verb."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Loading a model, a tokenizer or an adapter, or asking a server, is a failure of the test."""

    def loaded(*_, **__):
        raise AssertionError("something was loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", loaded)
    monkeypatch.setattr("roadie.checkpoint.load", loaded)
    monkeypatch.setattr("roadie.traffic.drive", loaded)
    monkeypatch.setattr("roadie.traffic.models_of", loaded)
    monkeypatch.setattr("roadie.embedded.load_model", loaded)


def jobs_file(folder, output, texts):
    file = folder / "jobs.yaml"
    file.write_text(json.dumps({"jobs": [{"name": "a", "data": str(texts), "output": str(output), "steps": 1}]}))
    return file


def verbs(adapter, texts, tmp_path):
    """What each verb that writes is called with, but for the place."""
    return {
        "train": ["train", texts, "-o"],
        "merge": ["merge", adapter, "-o"],
        "fit": ["fit", adapter, "-o"],
        "to-lora": ["combine", "to-lora", adapter, "--rank", 1, "-o"],
        "inverse": ["combine", "inverse", adapter, "-o"],
        "convert": ["combine", "convert", adapter, "--variant", "road_2", "-o"],
        "demo": ["demo", "--quick", "-o"],
        "work": ["train-many", jobs_file(tmp_path, tmp_path / "a", texts), "--work"],
        "inspect": ["inspect", adapter, "-o"],
        "png": ["inspect", adapter, "--png"],
        "compare": ["compare", adapter, adapter, "-o"],
        "json": ["bench-serve", "-m", "a", "--json"],
    }


FOLDERS = ("convert", "fit", "inverse", "merge", "png", "to-lora", "train")
VERBS = (*FOLDERS, "compare", "demo", "inspect", "json", "work")


def refused(result):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_below_a_file_is_refused_first(roadie_cli, trained, texts, tmp_path, nothing_is_loaded, verb):
    file = tmp_path / "file"
    file.write_text("x")
    before = sorted(tmp_path.iterdir())
    arguments = verbs(trained["one"], texts, tmp_path)[verb]
    line = refused(roadie_cli(*arguments, file / "deeper" / "out.html"))
    assert f"got {file}, which is no folder, on the way" in line
    assert file.read_text() == "x"
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "jobs.yaml"] == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_the_system_does_not_let_write_is_refused_first(
    roadie_cli, trained, texts, tmp_path, monkeypatch, nothing_is_loaded, verb
):
    """Permissions do not bind everybody (root, say), so that the system's answer is made here."""

    def denied(*_, dir, **__):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr("roadie.training.folders.tempfile.mkdtemp", denied)
    arguments = verbs(trained["one"], texts, tmp_path)[verb]
    line = refused(roadie_cli(*arguments, tmp_path / "new" / "out.html"))
    assert f"got {tmp_path}, into which nothing can be written (Permission denied)" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_that_is_not_empty_is_refused_first(roadie_cli, trained, texts, tmp_path, nothing_is_loaded, verb):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("x")
    line = refused(roadie_cli(*verbs(trained["one"], texts, tmp_path)[verb], there))
    assert f"{there}: got a folder that is not empty" in line
    assert [path.name for path in there.iterdir()] == ["mine"]


@pytest.mark.parametrize("verb", ["inspect", "json", "compare"])
def test_a_folder_in_the_place_of_a_file_is_refused_first(
    roadie_cli, trained, texts, tmp_path, nothing_is_loaded, verb
):
    there = tmp_path / "there.html"
    there.mkdir()
    assert str(there) in refused(roadie_cli(*verbs(trained["one"], texts, tmp_path)[verb], there))


def test_outputs_of_jobs_are_looked_at_first(roadie_cli, texts, tmp_path, nothing_is_loaded):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("x")
    line = refused(roadie_cli("train-many", jobs_file(tmp_path, there, texts)))
    assert f"{there}: got a folder that is not empty" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.yaml", "there"]


def test_looking_leaves_no_trace(roadie_cli, trained, tmp_path):
    assert roadie_cli("combine", "inverse", trained["one"], "-o", tmp_path / "new" / "out").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
