"""`roadie fit`: from folders to an adapter, a table and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from roadie import checkpoint
from roadie.rotation import from_parameters, rotate_weight


@pytest.fixture(scope="module")
def turned_path(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    """The tiny model with every linear layer but the head turned, and one norm changed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                theta, alpha = 0.2 * torch.randn(2, len(parameter))
                parameter.copy_(rotate_weight(parameter, from_parameters(theta, 1 + alpha, "road_2", 16)))
        model.model.norm.weight += 0.1
    folder = tmp_path_factory.mktemp("turned") / "model"
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def fit(call, *arguments):
    result = call("fit", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_whole_model(roadie_cli, tiny_path, turned_path, tmp_path):
    printed = fit(roadie_cli, turned_path, "-m", tiny_path, "-o", tmp_path / "a", "--group-size", 16)
    adapter = checkpoint.load(tmp_path / "a")
    assert len(adapter.layers) == 14
    assert adapter.base_model_name == str(tiny_path)
    assert printed.count("100.00%") == 15  # every layer, and all of them
    assert "Not fitted: model.norm.weight (changed, not a target)" in " ".join(printed.split())
    assert f"{adapter.num_parameters:,} parameters" in printed
    assert "whole model, weights" in printed


def test_json_and_options(roadie_cli, tiny_path, turned_path, tmp_path):
    arguments = (turned_path, "-m", tiny_path, "-o", tmp_path / "a", "--group-size", 48, "--adapt-group-size")
    arguments += ("--variant", "road_1")
    printed = fit(
        roadie_cli, *arguments, "-t", "q_proj", "-t", "up_proj", "--ridge", 0.01, "--minimum-share", 0.001, "--json"
    )
    found = json.loads(printed)
    assert {layer["path"].rpartition(".")[2] for layer in found["layers"]} == {"q_proj", "up_proj"}
    assert {layer["group_size"] for layer in found["layers"]} == {16}
    assert {layer["variant"] for layer in found["layers"]} == {"road_1"}
    assert 0 < found["share_explained"] < 1
    assert 0 < found["share_of_everything"] < found["share_explained"]
    assert {each["name"] for each in found["not_fitted"]} >= {
        "model.norm.weight",
        "model.layers.0.mlp.down_proj.weight",
    }
    adapter = checkpoint.load(tmp_path / "a")
    assert adapter.num_parameters == found["parameters"]
    result = roadie_cli("info", tmp_path / "a")
    assert result.exit_code == 0, result.output


def test_a_lora_adapter_names_its_base(roadie_cli, tiny_path, texts, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = peft.LoraConfig(target_modules=["v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    found = json.loads(fit(roadie_cli, tmp_path / "lora", "-o", tmp_path / "a", "--group-size", 16, "--json"))
    assert found["base_model"] == str(tiny_path)
    assert found["method"] == "LoRA adapter, weights"
    assert len(found["layers"]) == 2
    on_text = ("--text", texts, "--tokens", 400, "--inputs", "wanted", "--json")
    found = json.loads(fit(roadie_cli, tmp_path / "lora", "-o", tmp_path / "b", "--group-size", 16, *on_text))
    assert found["method"] == "LoRA adapter, outputs"
    changed = {layer["path"] for layer in found["layers"] if layer["share_explained"] > 0.05}
    assert {path for path in changed if "v_proj" in path} == {f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)}


def test_on_a_text(roadie_cli, tiny_path, turned_path, texts, tmp_path):
    arguments = (turned_path, "-m", tiny_path, "-o", tmp_path / "a", "--group-size", 16, "--text", texts, "--json")
    found = json.loads(fit(roadie_cli, *arguments))
    assert found["method"] == "whole model, outputs"
    assert found["share_explained"] > 0.999
    assert len(found["layers"]) == 14


def test_a_model_saved_without_its_head(roadie_cli, tiny_path, turned_path, tmp_path):
    """Its tensors lack the prefix that its modules have: the adapter has the paths of the modules."""
    folders = []
    for path in (tiny_path, turned_path):
        folders.append(tmp_path / f"inner{len(folders)}")
        AutoModelForCausalLM.from_pretrained(path).model.save_pretrained(folders[-1])
        shutil.copy(tiny_path / "config.json", folders[-1] / "config.json")
    fit(roadie_cli, folders[1], "-m", folders[0], "-o", tmp_path / "a", "--group-size", 16)
    assert "model.layers.0.self_attn.q_proj" in checkpoint.load(tmp_path / "a").layers


def test_refusals_write_nothing(roadie_cli, tiny_path, turned_path, tmp_path):
    broken = shutil.copytree(turned_path, tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-50])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    for arguments, text in (
        ((broken, "-m", tiny_path), "corrupt or truncated"),
        ((tmp_path / "pickled", "-m", tiny_path), "pickle"),
        ((tmp_path / "nowhere", "-m", tiny_path), "no such folder"),
        ((turned_path, "-m", tiny_path, "--group-size", 10), "group_size"),
        ((turned_path, "-m", tiny_path, "--group-size", 16, "-t", "nothing"), "which no linear layer is"),
        ((tiny_path, "-m", tiny_path, "--group-size", 16), "do not differ"),
        ((turned_path, "-m", tiny_path, "--group-size", 16, "--text", tmp_path / "no.txt"), "no.txt"),
        ((turned_path, "-m", "no/such-model"), "no/such-model"),
    ):
        result = roadie_cli("fit", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.stderr.split()), result.stderr
        assert not (tmp_path / "out").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    result = roadie_cli("fit", turned_path, "-m", tiny_path, "-o", taken, "--group-size", 16)
    assert result.exit_code == 2
    assert [path.name for path in taken.iterdir()] == ["mine"]
