"""Adapters by name: what may be named, what is read, and that nothing runs that came with a file."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from roadie import embedded
from roadie.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.training.adapters import NamedAdapter, adapter_folder, load_adapted, parse_adapters
from roadie.training.models import ModelSource

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


@pytest.fixture
def pickled(tmp_path, adapters):
    """An adapter whose weights are a pickle."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(adapters["one"] / CONFIG, folder)
    torch.save(load_file(adapters["one"] / WEIGHTS), folder / PICKLE)
    return folder


def test_names_are_given_or_made_from_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/french", "out/v1.5 beta", "out/model", "out/lr=3e-3"):
        (tmp_path / name).mkdir(parents=True)
    asked = ["polite=out/french", "out/french/", "owner/tiny", "out/v1.5 beta", "out/model", "out/lr=3e-3"]
    assert parse_adapters(asked) == (
        NamedAdapter("polite", "out/french"),
        NamedAdapter("french", "out/french/"),
        NamedAdapter("tiny", "owner/tiny"),
        NamedAdapter("v1_5_beta", "out/v1.5 beta"),
        NamedAdapter("adapter_model", "out/model"),
        NamedAdapter("lr_3e-3", "out/lr=3e-3"),
    )


@pytest.mark.parametrize("text", ["a.b=x", "-a=x", "=x", "__base__=x", f"{'a' * 129}=x", "a b=x", "a/b=x", "é=x"])
def test_names_that_peft_would_take_apart_are_refused(text):
    with pytest.raises(ConfigError, match="adapter name"):
        parse_adapters([text])


def test_a_name_needs_a_path_and_is_used_once():
    with pytest.raises(ConfigError, match="wanted NAME=PATH; add the path"):
        parse_adapters(["a="])
    with pytest.raises(ConfigError, match="two adapters named 'a'"):
        parse_adapters(["a=x", "b=x", "a=y"])


def test_a_file_in_the_folder_will_do(adapters):
    with adapter_folder(str(adapters["one"] / WEIGHTS)) as folder:
        assert folder == adapters["one"]


@pytest.mark.parametrize("path", ["no/such/folder", "nothing", "roadie-tests/no-such-adapter"])
def test_what_does_not_exist_is_refused(path):
    with pytest.raises(CheckpointError, match=path), adapter_folder(path):
        pass


def test_a_pickle_is_refused(pickled):
    with pytest.raises(UnsafeCheckpointError, match="pickle"), adapter_folder(str(pickled)):
        pass
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        load_adapted([str(pickled)])


def test_an_allowed_pickle_gives_the_same_adapter(pickled, adapters, tiny_path):
    with adapter_folder(str(pickled), allow_pickle=True) as folder:
        copy, original = load_file(folder / WEIGHTS), load_file(adapters["one"] / WEIGHTS)
        assert copy.keys() == original.keys()
        assert all(torch.equal(copy[name], original[name]) for name in original)
    assert not folder.exists()
    assert not (pickled / WEIGHTS).exists()
    adapted = load_adapted([f"one={pickled}"], ModelSource(str(tiny_path), allow_pickle=True))
    assert adapted.names == ("one",)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_an_allowed_pickle_does_not_run(pickled, tmp_path):
    torch.save({"x": Harmful(str(tmp_path / "was-here"))}, pickled / PICKLE)
    with pytest.raises(CheckpointError, match="more than tensors"), adapter_folder(str(pickled), allow_pickle=True):
        pass
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("content", [["no mapping"], {"x": 3}])
def test_an_allowed_pickle_of_something_else_is_refused(pickled, content):
    torch.save(content, pickled / PICKLE)
    with pytest.raises(CheckpointError, match="other than a mapping"), adapter_folder(str(pickled), allow_pickle=True):
        pass


def test_the_base_model_is_the_one_the_adapters_name(adapters, tiny_path):
    adapted = load_adapted([str(path) for path in adapters.values()])
    assert adapted.source.place == str(tiny_path)
    assert adapted.names == tuple(adapters)
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())
    assert not adapted.model.training


def test_without_adapters_it_is_the_embedded_model():
    adapted = load_adapted([])
    assert (adapted.source.place, adapted.names) == (str(embedded.model_path()), ())
    assert not hasattr(adapted.model, "peft_config")


def test_adapters_of_different_models_are_refused_unless_one_is_named():
    with pytest.raises(ConfigError, match="different base models"):
        ModelSource().for_adapters(["a", "b", None])
    assert ModelSource("c").for_adapters(["a", "b"]).place == "c"
    assert ModelSource(revision="x").for_adapters(["a", None, "a"]) == ModelSource("a", revision="x")


@pytest.mark.parametrize("place", ["/somewhere/else/site-packages/{}", "C:\\python\\site-packages\\{}"])
def test_an_adapter_of_the_embedded_model_works_on_another_machine(place):
    here = embedded.model_path()
    separator = "\\" if "\\" in place else "/"
    recorded = place.format(separator.join(here.parts[-3:]))
    assert ModelSource().for_adapters([recorded]).place == str(here)


def test_base_weights_that_are_no_safetensors_need_to_be_allowed(tiny_path, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_path, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--allow-pickle"):
        load_adapted([], str(base))
    assert load_adapted([], ModelSource(str(base), allow_pickle=True)).model.num_parameters() > 0


def test_remote_code_needs_to_be_allowed(tiny_path, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_path, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_adapted([], str(base))
    assert not (tmp_path / "was-here").exists()
