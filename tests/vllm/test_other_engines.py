"""Engines of other settings: few slots, parts rotated one by one, LoRA beside the plug-in, and workers without it."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import vllm.plugins
from tests.vllm import cases
from vllm import LLM

from roadie.errors import AdapterError, ConfigError


def of_several_sizes(folder: Path) -> Path:
    """q in groups of 64, k of 16, v of 2: with roadie alone, PEFT has no such pattern."""
    cases.write_adapter(folder, "road_2", 64, ("q_proj", "k_proj", "v_proj"), seed=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"variant": "roadie:road_2", "group_size_pattern": {"k_proj": 16, "v_proj": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_few_slots_parts_of_their_own_and_files_that_vanish(base: Path, kinds: dict[str, Path], tmp_path: Path) -> None:
    """Two slots and room for two adapters: the others are read again and again, from copies, while their files are gone."""
    names = ("all-1", "all-4", "k-2", "gate-4", "pairs-2")
    gone = [shutil.copytree(kinds[name], tmp_path / "gone" / name) for name in names]
    gone += [of_several_sizes(tmp_path / "gone" / "several"), *cases.write_chains(tmp_path / "gone")]
    stay = {path: shutil.copytree(path, tmp_path / "stay" / path.name) for path in gone}
    with cases.engine(base, 2, road={"packing": "parts"}) as llm:
        requests = cases.Requests()
        first = cases.generate(llm, requests, [*gone, None] * 2)
        shutil.rmtree(tmp_path / "gone")
        assert cases.generate(llm, requests, [*gone, None] * 2) == first
    answers = [cases.Generated(stay.get(each.adapter), each.prompt, each.tokens) for each in first]
    verdict = cases.judged_by_bank(answers)
    print(f"\nfew slots: {verdict}")
    assert verdict.wrong == 0
    assert verdict.like_base <= 2 + 2


def test_an_engine_of_lora_adapters_is_as_it_was(base: Path, kinds: dict[str, Path], tmp_path: Path) -> None:
    """The plug-in is active and nobody asked for RoAd: LoRA works, and a RoAd adapter is refused with what to do."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=list(cases.EVERYWHERE), init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(cases.base_model(), config).eval()
    model.save_pretrained(tmp_path / "lora")
    with cases.engine(base, None, enable_lora=True, max_loras=2) as llm:
        requests = cases.Requests()
        adapted, plain = cases.generate(llm, requests, [tmp_path / "lora", None])
        with pytest.raises(Exception, match=r"got a RoAd adapter .* for a server of LoRA adapters.*additional-config"):
            llm.llm_engine.add_lora(requests(kinds["all-1"]))
        assert cases.generate(llm, requests, [tmp_path / "lora", None]) == [adapted, plain]
    sequence = torch.tensor([[*adapted.prompt, *adapted.tokens]])
    with torch.no_grad():
        favourites = model(sequence).logits[0, len(adapted.prompt) - 1 : -1].argmax(-1).tolist()
    assert favourites == list(adapted.tokens)


def test_workers_without_the_plugin_are_noticed(
    base: Path, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.plugins.load_general_plugins()  # active in this process
    monkeypatch.setenv("VLLM_PLUGINS", "none-of-them")  # and not in those that it starts
    with cases.engine(base, 2) as llm:
        requests: Any = cases.Requests()
        before = cases.generate(llm, requests, [None])
        with pytest.raises(AdapterError, match="workers in which roadie's plug-in is not active"):
            cases.generate(llm, requests, [kinds["all-1"]])
        assert cases.generate(llm, requests, [None]) == before


def test_what_cannot_be_served_is_refused_before_anything_starts(base: Path) -> None:
    with pytest.raises(ConfigError, match="got fully_sharded_loras=True"):
        LLM(**cases.engine_settings(base, 2, fully_sharded_loras=True))
    with pytest.raises(ConfigError, match=r"in additional_config without LoRA; set enable_lora=True"):
        LLM(**cases.engine_settings(base, None, additional_config={"roadie": True}))
    with pytest.raises(ConfigError, match=r"got roadie\.adapters='/nowhere'; wanted a folder"):
        LLM(**cases.engine_settings(base, 2, road={"adapters": "/nowhere"}))
    with pytest.raises(ConfigError, match=r"got roadie\.colour"):
        LLM(**cases.engine_settings(base, None, enable_lora=True, additional_config={"roadie": {"colour": 1}}))
