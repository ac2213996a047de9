"""Settings of vLLM that an engine for RoAd refuses; and vLLM's compile cache, which must tell engines apart."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

from types import SimpleNamespace
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig

from roadie.adapter import Adapter, LayerParameters
from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Variant
from roadie.vllm.limits import check_supported
from roadie.vllm.matching import layer_rotations


def config(**changes: Any) -> SimpleNamespace:
    lora = {"fully_sharded_loras": False, "enable_tower_connector_lora": False, **changes}
    return SimpleNamespace(additional_config={"roadie": True}, lora_config=SimpleNamespace(**lora))


def test_ordinary_settings_are_taken() -> None:
    check_supported(config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fully_sharded_loras": True}, "divides matrices that RoAd does not have"),
        ({"enable_tower_connector_lora": True}, "vision towers are not supported"),
    ],
)
def test_settings_of_lora_that_cannot_be_served_are_refused(change: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_supported(config(**change))


def test_the_second_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", True, raising=False)
    with pytest.raises(ConfigError, match="a rotation needs the base layer's output"):
        check_supported(config())


def test_the_key_of_the_compile_cache_knows_the_plugin() -> None:
    keys = {
        VllmConfig(additional_config=additional).compute_hash()
        for additional in ({}, {"roadie": {"version": "1"}}, {"roadie": {"version": "2"}})
    }
    assert len(keys) == 3


def test_rotations_of_stacked_experts_are_refused_with_what_is_missing() -> None:
    layer = LayerParameters(torch.zeros(16), torch.ones(16), Variant.ROAD_1, 4)
    adapter = Adapter({"model.layers.0.mlp.experts.road_down": layer})
    said = (
        r"vLLM plug-in, which does not rotate where .*LoRAExpertsMixin.*got a rotation of stacked experts, .*road_down;"
    )
    with pytest.raises(AdapterError, match=said):
        layer_rotations(adapter, SimpleNamespace())
