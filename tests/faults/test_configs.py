"""Faults of stock PEFT in adapter_config.json, and settings that LoRA has and stock RoAd lacks.

A config whose meaning stock PEFT would lose must be refused by it, and mean the same here after a round trip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.patience import HANG_S

from roadie.testing import tiny_llama

IDS = torch.arange(12).reshape(2, 6)
LLAMA = {"attention_bias": True, "mlp_bias": True}
BASIC = {"target_modules": ["q_proj", "v_proj", "down_proj"], "group_size": 16}

LAYER = r"model\.layers\.(\d+)\.\w+\."


@dataclass(frozen=True)
class Extra:
    """Settings stock PEFT lacks, and what they must do to a two-layer Llama."""

    settings: dict[str, Any]
    adapted: int = 6  # RoAd layers
    variants: dict[str, str] = field(default_factory=dict)
    group_sizes: dict[str, int] = field(default_factory=dict)
    trained: tuple[str, ...] = ()  # parts of names of parameters that are trained besides RoAd's


EXTRAS = {
    "exclude_modules, names": Extra({"exclude_modules": ["v_proj"]}, adapted=4),
    "exclude_modules, expression": Extra({"exclude_modules": r".*layers\.0.*"}, adapted=3),
    "layers_to_transform, one": Extra({"layers_to_transform": 1}, adapted=3),
    "layers_to_transform, list": Extra({"layers_to_transform": [0]}, adapted=3),
    "layers_pattern": Extra({"layers_to_transform": [1], "layers_pattern": "layers"}, adapted=3),
    "bias, all": Extra({"bias": "all"}, trained=("k_proj.bias", "q_proj.base_layer.bias")),
    "bias, road_only": Extra({"bias": "road_only"}, trained=("q_proj.base_layer.bias",)),
    "trainable_token_indices, list": Extra({"trainable_token_indices": [1, 5]}, trained=("trainable_tokens_delta",)),
    "trainable_token_indices, mapping": Extra(
        {"trainable_token_indices": {"embed_tokens": [1, 5]}}, trained=("trainable_tokens_delta",)
    ),
    "variant_pattern": Extra(
        {"variant_pattern": {"q_proj": "road_4", r"layers\.1\..*down_proj": "road_2"}},
        variants={"0.self_attn.q_proj": "road_4", "1.mlp.down_proj": "road_2", "0.mlp.down_proj": "road_1"},
    ),
    "group_size_pattern": Extra(
        {"group_size_pattern": {"down_proj": 4, r"layers\.0\.self_attn\.v_proj": 2}},
        group_sizes={"1.mlp.down_proj": 4, "0.self_attn.v_proj": 2, "1.self_attn.v_proj": 16},
    ),
    "patterns, the first match counts": Extra(
        {"group_size_pattern": {"v_proj": 8, ".*_proj": 4}}, group_sizes={"0.self_attn.v_proj": 8, "0.mlp.down_proj": 4}
    ),
    "adapt_group_size": Extra(
        {"group_size": 48, "adapt_group_size": True}, group_sizes={"0.self_attn.q_proj": 16, "1.mlp.down_proj": 16}
    ),
}


def _base() -> Any:
    return tiny_llama(**LLAMA).eval()


def _trained(implementation: Any, extra: Extra) -> Any:
    """A model with every parameter that the config trains moved away from its start."""
    model = implementation.adapt(_base(), **{**BASIC, **extra.settings}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _assert_means(model: Any, extra: Extra) -> None:
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "road_theta")}
    assert len(layers) == extra.adapted
    for wanted, attribute in ((extra.variants, "variant"), (extra.group_sizes, "group_size")):
        for end, value in wanted.items():
            (layer,) = [module for name, module in layers.items() if name.endswith(end)]
            assert getattr(layer, attribute)["default"] == value, end


@pytest.mark.parametrize("what", EXTRAS)
def test_stock_peft_has_no_such_setting(fault: Any, what: str) -> None:
    extra = EXTRAS[what]

    def check(implementation: Any) -> None:
        model = _trained(implementation, extra)
        _assert_means(model, extra)
        others = [name for name, p in model.named_parameters() if p.requires_grad and ".road_" not in name]
        assert all(any(part in name for name in others) for part in extra.trained)
        assert bool(others) == bool(extra.trained), others
        if extra.settings.get("bias") == "road_only":
            assert not any("k_proj" in name for name in others)

    fault(check, on_stock=TypeError, match="got an unexpected keyword argument")


@pytest.mark.parametrize("what", EXTRAS)
def test_stock_peft_refuses_the_config_and_we_load_it_with_its_meaning(
    fault: Any, ours: Any, tmp_path: Path, what: str
) -> None:
    extra = EXTRAS[what]
    model = _trained(ours, extra)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted, plain = model(IDS).logits, _base()(IDS).logits
    assert (wanted - plain).abs().max() > 1e-3

    def check(implementation: Any) -> None:
        loaded = implementation.load(_base(), tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, wanted)
        _assert_means(loaded, extra)
        config, original = loaded.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
        assert {key: config[key] for key in extra.settings} == {key: original[key] for key in extra.settings}

    fault(check, on_stock=ValueError, match="Invalid variant roadie:road_1 specified")


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_the_variant_of_a_refused_config_comes_back(fault: Any, ours: Any, tmp_path: Path, variant: str) -> None:
    ours.config(variant=variant, bias="all").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["variant"] == f"roadie:{variant}"

    def check(implementation: Any) -> None:
        config = implementation.config.from_pretrained(tmp_path)
        assert (config.variant, config.bias) == (variant, "all")

    fault(check, on_stock=ValueError, match=f"Invalid variant roadie:{variant} specified")


def test_a_config_without_extras_is_stock_peft_s(both: Any, ours: Any, tmp_path: Path) -> None:
    model = _trained(ours, Extra({}))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(IDS).logits

    def check(implementation: Any) -> None:
        with torch.no_grad():
            got = implementation.load(_base(), tmp_path).eval()(IDS).logits
        torch.testing.assert_close(got, wanted)

    both(check)


_SAVE = """
import sys
import peft, roadie
from roadie.testing import stock_peft
settings = dict(
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    modules_to_save=["lm_head", "norm"],
)
with stock_peft() as config:
    config(**settings).save_pretrained(sys.argv[1] + "/stock")
roadie.RoadConfig(**settings).save_pretrained(sys.argv[1] + "/roadie")
roadie.RoadConfig(exclude_modules=["a", "b", "c", "d"], **settings).save_pretrained(sys.argv[1] + "/roadie_extra")
"""


@pytest.fixture(scope="module")
def configs_by_seed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of configs written by processes that differ in nothing but the seed of their hashes."""
    source = str(Path(peft.__file__).parent.parent)
    here = os.pathsep.join([str(Path(__file__).resolve().parents[2] / "src"), source])
    folders = [tmp_path_factory.mktemp(f"seed_{seed}") for seed in (1, 2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SAVE, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": here},
        )
        for seed, folder in enumerate(folders, start=1)
    ]
    assert [process.wait(timeout=HANG_S) for process in processes] == [0, 0]
    return folders


def test_the_config_file_is_the_same_whatever_the_seed_of_hashes(fault: Any, configs_by_seed: list[Path]) -> None:
    def check(implementation: Any) -> None:
        folders = ["stock"] if implementation.is_stock else ["roadie", "roadie_extra"]
        for name in folders:
            one, other = ((folder / name / "adapter_config.json").read_bytes() for folder in configs_by_seed)
            assert json.loads(one)["peft_type"] == "ROAD"
            assert one == other, "the file depends on the seed of hashes"

    fault(check, match="the file depends on the seed of hashes")
