"""Bad adapters, and adapters of other models: an exception with the reason, and an engine that goes on."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.vllm import cases

from roadie.errors import AdapterError, CheckpointError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def sound(folder: Path, **more: Any) -> Path:
    return cases.write_adapter(folder, "road_1", 64, more.pop("targets", ("q_proj",)), **more)


def truncated(folder: Path) -> None:
    weights = sound(folder) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def without_weights(folder: Path) -> None:
    (sound(folder) / WEIGHTS).unlink()


def without_config(folder: Path) -> None:
    (sound(folder) / CONFIG).unlink()


def not_json(folder: Path) -> None:
    (sound(folder) / CONFIG).write_text("{")


def a_pickle(folder: Path) -> None:
    torch.save(load_file(sound(folder) / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def not_finite(folder: Path) -> None:
    tensors = load_file(sound(folder) / WEIGHTS)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def a_lora(folder: Path) -> None:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(cases.base_model(), config).save_pretrained(folder)


def with_a_layer_too_many(folder: Path) -> None:
    tensors = load_file(sound(folder) / WEIGHTS)
    more = {key.replace("layers.1.", "layers.7."): value.clone() for key, value in tensors.items()}
    save_file(tensors | more, folder / WEIGHTS, metadata={"format": "pt"})


def of_a_wider_model(folder: Path) -> None:
    tensors = load_file(sound(folder) / WEIGHTS)
    save_file({k: torch.cat((v, v)) for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def of_lm_head(folder: Path) -> None:
    tensors = load_file(sound(folder, targets=("q_proj", "lm_head")) / WEIGHTS)
    rotations = {key: value for key, value in tensors.items() if ".road_" in key}
    assert len(rotations) == len(tensors) - 1  # PEFT saves the base's lm_head with it
    save_file(rotations, folder / WEIGHTS, metadata={"format": "pt"})


def with_a_whole_module(folder: Path) -> None:
    tensors = load_file(sound(folder) / WEIGHTS)
    tensors["base_model.model.model.norm.weight"] = torch.ones(cases.SIZES["hidden_size"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def of_two_sizes_in_one_layer(folder: Path) -> None:
    config = json.loads((sound(folder, targets=("q_proj", "k_proj")) / CONFIG).read_text())
    config |= {"variant": "roadie:road_1", "group_size_pattern": {"k_proj": 32}}
    (folder / CONFIG).write_text(json.dumps(config))


BAD: dict[Callable[[Path], None], str] = {
    truncated: "safetensors",
    without_weights: "adapter_model.safetensors",
    without_config: "no such file",
    not_json: "not JSON",
    a_pickle: "pickle",
    not_finite: "finite",
    a_lora: "'LORA'",
    with_a_layer_too_many: "model.layers.7.self_attn.q_proj (not in the model)",
    of_a_wider_model: "got 512 outputs; the model has 256",
    of_lm_head: "a ParallelLMHead, which the plug-in leaves to vLLM",
    with_a_whole_module: "norm.weight",
    of_two_sizes_in_one_layer: '"packing": "parts"',
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_adapter_is_an_exception_and_the_engine_lives(
    llm: Any, requests: Any, kinds: dict[str, Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / make.__name__
    make(folder)
    good = [None, kinds["all-1"]]
    before = cases.generate(llm, requests, good)
    for _ in range(2):  # a refusal is not remembered as an admission
        with pytest.raises((AdapterError, CheckpointError)) as caught:
            cases.generate(llm, requests, [kinds["all-2"], folder])
        assert BAD[make] in str(caught.value)
    assert cases.generate(llm, requests, good) == before
    assert not llm.llm_engine.has_unfinished_requests()


def test_an_adapter_that_was_mended_is_taken(llm: Any, requests: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mended"
    of_a_wider_model(folder)
    with pytest.raises(AdapterError, match="got 512 outputs"):
        cases.generate(llm, requests, [folder])
    shutil.rmtree(folder)
    shutil.copytree(kinds["all-1"], folder)
    (mended,), (same,) = (cases.generate(llm, requests, [path]) for path in (folder, kinds["all-1"]))
    assert mended.tokens == same.tokens


def test_a_replacement_that_does_not_fit_leaves_the_adapter_as_it_was(
    llm: Any, requests: Any, kinds: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(kinds["all-4"], folder)
    before = cases.generate(llm, requests, [folder])
    shutil.rmtree(folder)
    for make in (of_a_wider_model, truncated):
        make(folder)
        with pytest.raises((AdapterError, CheckpointError)):
            llm.llm_engine.add_lora(requests(folder, load_inplace=True))
        assert cases.generate(llm, requests, [folder]) == before
        shutil.rmtree(folder)
