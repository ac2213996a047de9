"""Merging to disk: a whole plain model, equal to the adapted one, or nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import roadie
from roadie.errors import ConfigError
from roadie.training.adapters import load_adapted
from roadie.training.folders import OutputExists
from roadie.training.merging import merge_to_disk

TOKENS = torch.arange(5, 45).reshape(2, 20)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["two", "one"]], ids="-".join)
def test_the_merged_model_is_the_adapted_one(adapters, tmp_path, names):
    result = merge_to_disk([str(adapters[name]) for name in names], tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    adapted = load_adapted([str(adapters[name]) for name in names]).model
    adapted.base_model.set_adapter(names)
    expected = logits(adapted)
    assert result.adapters == tuple(names)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1


def test_the_order_of_adapters_counts(tiny, tiny_path, tmp_path):
    paths = []
    for seed in range(2):  # road_1 commutes, road_2 does not
        config = roadie.RoadConfig(target_modules="all-linear", group_size=16, variant="road_2", init_weights=False)
        model = tiny.model()
        model.name_or_path = str(tiny_path)
        paths.append(str(tmp_path / f"adapter{seed}"))
        torch.manual_seed(seed)
        roadie.get_peft_model(model, config).save_pretrained(paths[-1])
    merge_to_disk(paths, tmp_path / "ab")
    merge_to_disk(paths[::-1], tmp_path / "ba")
    ab, ba = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ab", "ba"))
    assert (logits(ab) - logits(ba)).abs().max() > 1e-3


def test_everything_a_model_needs_is_there(adapters, tiny_path, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_path).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(base)
    GenerationConfig(max_new_tokens=7, eos_token_id=1).save_pretrained(base)
    result = merge_to_disk([str(adapters["one"])], tmp_path / "merged", model=str(base), max_shard_size="200KB")
    files = dict(result.files)
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 1
    assert all(files[name] < 220_000 for name in shards)
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= files.keys()
    assert all((tmp_path / "merged" / name).stat().st_size == size for name, size in files.items())
    assert not {name for name in files if name.endswith((".bin", ".pt"))}
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    text = "Turtles, ünïcode\n"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_path, tmp_path / "merged")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_of_the_base_is_kept(adapters, tiny, tmp_path, dtype):
    base = tiny.build(tmp_path / "base", dtype)
    result = merge_to_disk([str(adapters["one"])], tmp_path / "merged", model=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == result.dtype
    assert logits(merged).dtype == dtype


def test_no_roadie_and_no_peft_is_needed_to_load_it(adapters, tmp_path):
    merge_to_disk([str(adapters["one"])], tmp_path / "merged")
    script = f"""
import sys
sys.modules["roadie"] = sys.modules["peft"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_what_is_there_is_not_overwritten(adapters, tmp_path):
    (tmp_path / "old").write_text("0")
    with pytest.raises(OutputExists):
        merge_to_disk([str(adapters["one"])], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    merge_to_disk([str(adapters["one"])], tmp_path, overwrite=True)
    assert not (tmp_path / "old").exists()


def test_a_failure_leaves_nothing(adapters, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        merge_to_disk([str(adapters["one"])], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "5 gigabytes", "0GB"])
def test_shard_sizes_are_checked(adapters, tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        merge_to_disk([str(adapters["one"])], tmp_path / "merged", max_shard_size=size)


def test_adapters_are_wanted_in_a_list(adapters, tmp_path):
    with pytest.raises(ConfigError, match="got no adapter"):
        merge_to_disk([], tmp_path / "merged")
    with pytest.raises(ConfigError, match="wanted a list"):
        merge_to_disk(str(adapters["one"]), tmp_path / "merged")
